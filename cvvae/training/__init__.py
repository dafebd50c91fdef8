"""The regularized finetune: any image VAE becomes a video VAE with a compatible latent space."""
