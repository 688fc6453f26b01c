"""The AR-VAE (Sec. 3.1): a TiTok-like encoder of single frames and a temporally causal decoder, without a quantiser.

Shapes: B videos, F frames, N = B F packed frames, H W pixels, L latent tokens, D latent width.
Video in and out: float ``(B, F, 3, H, W)`` in [-1, 1]; latents ``(B, F, L, D)``.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.layers import init_linear
from ardiff.resolution import Resolution
from ardiff.vae.config import AutoencoderConfig
from ardiff.vae.decoder import Decoder
from ardiff.vae.encoder import Encoder
from ardiff.vae.temporal import DecoderCache


@dataclass(frozen=True, slots=True)
class Posterior:
    """The encoder's diagonal Gaussian over latents: ``mean`` and ``log_variance``, each ``(B, F, L, D)``."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``: the reparametrised sample for standard normal ``noise`` of the same shape."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to the standard normal, mean over all elements, in nats."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance).mean()


class ARAutoencoder(nn.Module):
    """Encoder and decoder of the AR-VAE."""

    encoder_class: type[Encoder] = Encoder
    decoder_class: type[Decoder] = Decoder

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = self.encoder_class(config)
        self.decoder = self.decoder_class(config)
        self.apply(init_linear)
        self.decoder.zero_temporal_output()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def forward(self, video: Tensor, noise: Tensor, temporal: bool = True) -> tuple[Tensor, Posterior]:
        """Encodes, samples latents with standard normal ``noise (B, F, L, D)``, and decodes them.

        Returns the reconstruction, shaped like ``video``, and the posterior.
        """
        posterior = self.encode(video)
        shape = Resolution(*video.shape[3:])
        return self.decode(posterior.sample(noise), temporal=temporal, shape=shape), posterior

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of every frame of ``video (B, F, 3, H, W)``. Each frame is encoded alone.

        Raises:
            ValueError: The model does not know the shape of the frames.
        """
        self.config.check_shape(Resolution(*video.shape[3:]))
        moments = self.encoder(rearrange(video, "b f c h w -> (b f) c h w"))  # (N, L, 2 D)
        mean, log_variance = rearrange(moments, "(b f) l d -> b f l d", b=len(video)).chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(-20.0, 10.0))

    def latents(self, video: Tensor) -> Tensor:
        """The latents ``(B, F, L, D)`` of ``video`` that a diffusion model learns: the posterior's means."""
        return self.encode(video).mean

    def decode(
        self,
        latents: Tensor,
        cache: DecoderCache | None = None,
        temporal: bool = True,
        shape: Resolution | None = None,
    ) -> Tensor:
        """The frames of ``latents (B, F, L, D)``, float ``(B, F, 3, H, W)``, not clamped.

        Frame i depends on the latents of frames ``i - temporal_window + 1 .. i`` only. With a ``cache``, the latents
        continue those of earlier calls with the same cache, and the result equals decoding all of them at once.
        ``temporal=False`` decodes each frame alone. ``shape`` is one of those that the model knows, by default the
        first; another one is a ValueError.
        """
        shape = shape or self.config.resolution
        self.config.check_shape(shape)
        return self.decoder(latents, cache, temporal, shape)

    @torch.no_grad()
    def decode_long(self, latents: Tensor, chunk: int = 16, shape: Resolution | None = None) -> Tensor:
        """:meth:`decode` for videos of any length, ``chunk`` frames at a time to bound the memory."""
        cache = DecoderCache()
        return torch.cat([self.decode(part, cache, shape=shape) for part in latents.split(chunk, dim=1)], dim=1)
