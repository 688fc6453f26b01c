"""The kinds of models: which classes a stored or written configuration stands for.

The key ``kind`` of a ``dit`` or ``vae`` section chooses one. To add a kind, add its configuration class, which has its
own ``kind``, to a union below, and its model class to the function.
"""

from ardiff.dit import DiT, DiTConfig
from ardiff.upstream.autoencoder import UpstreamAutoencoder
from ardiff.upstream.config import UpstreamAutoencoderConfig, UpstreamDiTConfig
from ardiff.upstream.dit import UpstreamDiT
from ardiff.vae import ARAutoencoder, AutoencoderConfig

AnyDiTConfig = DiTConfig | UpstreamDiTConfig
AnyAutoencoderConfig = AutoencoderConfig | UpstreamAutoencoderConfig


def make_dit(config: DiTConfig) -> DiT:
    """An AR-DiT of the configuration's kind, with new weights."""
    return UpstreamDiT(config) if isinstance(config, UpstreamDiTConfig) else DiT(config)


def make_autoencoder(config: AutoencoderConfig) -> ARAutoencoder:
    """An AR-VAE of the configuration's kind, with new weights."""
    return UpstreamAutoencoder(config) if isinstance(config, UpstreamAutoencoderConfig) else ARAutoencoder(config)
