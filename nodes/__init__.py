"""The nodes: thin wrappers over the library ``cvvae``; only this folder imports ComfyUI."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .decode import CVVAEDecode
from .encode import CVVAEEncode
from .example import CVVAEExample
from .loader import CVVAELoader


class CVVAEExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [CVVAELoader, CVVAEEncode, CVVAEDecode, CVVAEExample]
