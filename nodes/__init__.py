"""The nodes: thin wrappers over the library ``cvvae``; only this folder imports ComfyUI."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .adapt import CVVAEAdapt
from .calculator import CVVAEFrameCalculator
from .decode import CVVAEDecode
from .download import CVVAEDownload
from .encode import CVVAEEncode
from .evaluate import CVVAEEvaluate
from .example import CVVAEExample
from .finetune import CVVAEFinetune
from .inflate import CVVAEInflate
from .interpolate import CVVAEInterpolateLatents
from .latent_time import CVVAEInsertLatents, CVVAEJoinLatents, CVVAEResampleLatents, CVVAETrimLatents
from .latent_tools import CVVAEEmptyLatents, CVVAELatentLayout, CVVAELatentStatistics, CVVAENormalizeLatents
from .loader import CVVAELoader
from .loss_plot import CVVAELossPlot
from .preview import CVVAEPreviewLatents
from .save import CVVAESave


class CVVAEExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [CVVAELoader, CVVAEEncode, CVVAEDecode, CVVAEExample, CVVAEInflate, CVVAEFinetune, CVVAEAdapt, CVVAELossPlot,
                CVVAEEvaluate, CVVAESave, CVVAEInterpolateLatents, CVVAETrimLatents, CVVAEResampleLatents,
                CVVAEJoinLatents, CVVAEInsertLatents, CVVAELatentLayout, CVVAELatentStatistics, CVVAENormalizeLatents,
                CVVAEEmptyLatents, CVVAEFrameCalculator, CVVAEDownload, CVVAEPreviewLatents]
