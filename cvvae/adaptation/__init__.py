"""Adapting a sampler: a diffusion model of Stable Diffusion's latent space learns to make CV-VAE's 4x-time latents.

Reads from top to bottom: ``config.py``, ``adapter.py`` (what is trained, and the file it becomes), ``objective.py`` (the
model's own objective), ``conditions.py`` and ``data.py`` (what it is trained on), ``motion.py`` (AnimateDiff's modules),
``comfyui.py`` (models of ComfyUI), ``trainer.py``, ``command.py``.
"""
