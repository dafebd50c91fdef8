"""What fits into how much memory: the presets of Finetune CV-VAE.  Plain data, so that importing it costs nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Settings of the trainer (see cvvae/training/config.py); the rest is the same for all presets or the user's."""

    buckets: list[tuple[int, int, int, int, float]]  # frames, height, width, batch, share
    validation_frames: int
    validation_size: int
    max_stride: int = 8
    accumulate: int = 1
    checkpointing: bool = True
    perceptual: str = "ms-ssim"  # LPIPS is what the paper uses, but needs a download
    gan: str = "none"
    gan_start: int = 0

    @property
    def longest(self) -> int:
        """Frames of its longest clips."""
        return max(frames for frames, *_ in self.buckets)


DEMONSTRATION = "demonstration (CPU)"
PRESETS = {
    DEMONSTRATION: Preset([(1, 48, 48, 4, 0.1), (9, 48, 48, 2, 0.9)], 9, 128, max_stride=2, checkpointing=False,
                          perceptual="none"),
    "low (8 GB)": Preset([(1, 256, 256, 1, 0.5), (9, 192, 192, 1, 0.5)], 17, 192, accumulate=4),
    "medium (12 GB)": Preset([(1, 256, 256, 4, 0.5), (9, 256, 256, 1, 0.5)], 17, 256, accumulate=2),
    # The paper's mix of shapes, and its discriminator once the picture is roughly there.
    "full (24 GB)": Preset([(1, 256, 256, 8, 0.4), (1, 512, 512, 2, 0.1), (9, 256, 256, 1, 0.25), (17, 192, 192, 1, 0.25)],
                           17, 256, gan="hinge", gan_start=1000),
}
