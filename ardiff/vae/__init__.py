"""The AR-VAE: an encoder of single frames and a temporally causal decoder."""

from ardiff.vae.autoencoder import ARAutoencoder, Posterior
from ardiff.vae.config import AutoencoderConfig
from ardiff.vae.temporal import DecoderCache

__all__ = ["ARAutoencoder", "AutoencoderConfig", "DecoderCache", "Posterior"]
