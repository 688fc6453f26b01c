"""The AR-VAE: per-frame encoder, temporally causal decoder."""

from ardiff.vae.autoencoder import ARAutoencoder, AutoencoderConfig, Posterior
from ardiff.vae.temporal import DecoderCache

__all__ = ["ARAutoencoder", "AutoencoderConfig", "DecoderCache", "Posterior"]
