"""The AR-VAE (Sec. 3.1): a TiTok-like encoder of single frames and a temporally causal decoder, without a quantiser.

Shapes: B batch, F frames, N = B F packed frames, H W pixels, P patches a frame, L tokens, D latent width, C width.
Video in and out: float ``(B, F, 3, H, W)`` in [-1, 1]; latents ``(B, F, L, D)``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.config import later
from ardiff.layers import init_linear
from ardiff.vae.decoder import Decoder
from ardiff.vae.encoder import Encoder
from ardiff.vae.pixels import PATCH_SIZE
from ardiff.vae.temporal import DecoderCache


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Sizes of the AR-VAE. The defaults are the paper's (Table 6)."""

    resolution: int = 256
    """Height and width of a frame in pixels."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    num_tokens: int = 32
    """Latent tokens per frame, L."""
    token_dim: int = 4
    """Width of a latent token, D."""
    width: int = 1024
    """Hidden width of encoder and decoder."""
    depth: int = 24
    """Blocks in the encoder, and again in the decoder."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the model width."""
    temporal_window: int = 16
    """Frames whose latent tokens a frame's patches may read in the decoder, the frame itself included; with
    ``temporal=clip``, frames of a clip."""
    temporal: Literal["window", "clip", "none"] = later("window")
    """How the decoder reads earlier frames. ``window``: a frame's patches read the latent tokens of the last
    ``temporal_window`` frames. ``clip``: as the authors' decoder, see :class:`ardiff.vae.temporal.ClipAttention`; a
    longer video is decoded as clips that do not know each other. ``none``: every frame stands alone."""
    stem: Literal["plain", "titok"] = later("plain")
    """``titok``: as in TiTok, on which the authors' AR-VAE builds: a class token, a norm before the first block,
    positions of their own for the encoder's latent tokens, and the exact GELU."""
    token_order: Literal["plain", "scrambled"] = later("plain")
    """``scrambled``: before the moments, the encoder's output is read as if its channels lay where its tokens lie, as
    in TiTok and the authors' code; weights trained so need it."""
    pixels: Literal["linear", "convolutional"] = later("linear")
    """What makes pixels of a decoded patch. ``convolutional``: TiTok's, which is for patches of 16 pixels."""
    pixel_range: Literal["signed", "unit"] = later("signed")
    """Pixels that the networks themselves work on: [-1, 1] or, in TiTok, [0, 1]. Video in and out is in [-1, 1] in
    either case."""
    unit_latents: bool = later(False)
    """Whether the decoder scales every latent token to length 1, as TiTok's; the diffusion model is then given tokens
    of length 1."""

    def __post_init__(self) -> None:
        sizes = (self.resolution, self.patch_size, self.num_tokens, self.token_dim)
        if min(*sizes, self.width, self.depth, self.num_heads, self.temporal_window) < 1:
            raise ValueError(
                "resolution, patch_size, num_tokens, token_dim, width, depth, num_heads and temporal_window must be at "
                "least 1"
            )
        if self.resolution % self.patch_size:
            raise ValueError(f"resolution {self.resolution} must be a multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads} and of 4")
        if self.pixels == "convolutional" and self.patch_size != PATCH_SIZE:
            raise ValueError(f"pixels=convolutional needs patch_size {PATCH_SIZE}, got {self.patch_size}")


@dataclass(frozen=True, slots=True)
class Posterior:
    """The encoder's diagonal Gaussian over latents: ``mean`` and ``log_variance``, each ``(B, F, L, D)``."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``: the reparametrised draw for standard normal ``noise`` of the same shape."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to the standard normal, mean over all elements, in nats."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance).mean()


class ARAutoencoder(nn.Module):
    """Encoder and decoder of the AR-VAE."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(init_linear)
        self.decoder.zero_temporal_output()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, video: Tensor, noise: Tensor, temporal: bool = True) -> tuple[Tensor, Posterior]:
        """Encodes, draws latents with standard normal ``noise (B, F, L, D)``, decodes.

        Returns the reconstruction, shaped like ``video``, and the posterior.
        """
        posterior = self.encode(video)
        return self.decode(posterior.sample(noise), temporal=temporal), posterior

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of every frame of ``video (B, F, 3, H, W)``; frames do not see each other."""
        if self.config.pixel_range == "unit":
            video = (video + 1) / 2
        moments = self.encoder(rearrange(video, "b f c h w -> (b f) c h w"))  # (N, L, 2 D)
        mean, log_variance = rearrange(moments, "(b f) l d -> b f l d", b=len(video)).chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(-20.0, 10.0))

    def latents(self, video: Tensor) -> Tensor:
        """What a diffusion model learns of ``video``: the posterior's means, of length 1 if ``config.unit_latents``."""
        mean = self.encode(video).mean
        return nn.functional.normalize(mean, dim=-1) if self.config.unit_latents else mean

    def decode(self, latents: Tensor, cache: DecoderCache | None = None, temporal: bool = True) -> Tensor:
        """The frames of ``latents (B, F, L, D)``, float ``(B, F, 3, H, W)``, not clamped.

        Frame i reads latents of frames ``i - temporal_window + 1 .. i`` only, or of those of them that are in its clip
        (see ``config.temporal``). With a ``cache``, the latents continue
        those of earlier calls with the same cache, and the result equals decoding all of them at once.
        """
        if self.config.unit_latents:
            latents = nn.functional.normalize(latents, dim=-1)
        video = self.decoder(latents, cache, temporal)
        return video if self.config.pixel_range == "signed" else 2 * video - 1

    @torch.no_grad()
    def decode_long(self, latents: Tensor, chunk: int = 16) -> Tensor:
        """:meth:`decode` for videos of any length in memory for ``chunk`` frames beside the result."""
        cache = DecoderCache()
        return torch.cat([self.decode(part, cache) for part in latents.split(chunk, dim=1)], dim=1)
