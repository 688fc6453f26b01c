"""The AR-VAE: per-frame encoder, temporally causal decoder."""

from ardiff.vae.autoencoder import ARAutoencoder, Posterior
from ardiff.vae.config import AutoencoderConfig
from ardiff.vae.temporal import DecoderCache

__all__ = ["ARAutoencoder", "AutoencoderConfig", "DecoderCache", "Posterior"]
