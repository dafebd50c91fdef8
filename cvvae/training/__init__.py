"""The regularized finetune: any image VAE becomes a video VAE with a compatible latent space."""


class TrainingError(RuntimeError):
    """A run that cannot go on, and what to change."""
