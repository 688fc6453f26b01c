"""The authors' AR-VAE, built on TiTok: a class token, a norm before the blocks, decoding in clips, soft-choice pixels.

Shapes: B videos, F frames, N = B F packed frames, H W pixels, P patches per frame, L latent tokens, D latent width,
C width, W frames of a clip, S >= F frames of the clip so far.
"""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.resolution import Resolution
from ardiff.upstream.config import UpstreamAutoencoderConfig
from ardiff.upstream.pixels import ConvolutionalPixels
from ardiff.vae.autoencoder import ARAutoencoder, Posterior
from ardiff.vae.blocks import patchify
from ardiff.vae.decoder import Decoder
from ardiff.vae.encoder import Encoder
from ardiff.vae.temporal import DecoderCache


class Stem(nn.Module):
    """The input of the first block: class token and patches with their positions, then latent tokens, normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        """``patches (N, P, C)``, ``positions (1 + P, C)``, ``tokens (N, L, C)`` -> ``(N, 1 + P + L, C)``."""
        class_tokens = repeat(self.class_token, "one c -> n one c", n=len(patches))
        x = torch.cat([class_tokens, patches], dim=1) + positions  # (N, 1 + P, C)
        return self.norm(torch.cat([x, tokens], dim=1))  # (N, 1 + P + L, C)


def add_stem(half: Encoder | Decoder) -> Stem:
    """Prepares one half for TiTok's weights (a position for the class token, exact GELU) and returns its stem."""
    half.patch_positions = nn.Parameter(nn.functional.pad(half.patch_positions.detach(), (0, 0, 1, 0)))
    for block in half.blocks:
        block.mlp.approximate = "none"  # type: ignore[union-attr]
    return Stem(half.patch_positions.shape[1])


class UpstreamEncoder(Encoder):
    """The standard encoder with TiTok's stem, positions of the latent tokens, and scrambled latent tokens."""

    def __init__(self, config: UpstreamAutoencoderConfig) -> None:
        super().__init__(config)
        self.stem = add_stem(self)
        self.token_positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))

    def forward(self, frames: Tensor) -> Tensor:
        patches = self.patch_in(patchify(frames, self.config.patch_size))  # (N, P, C)
        tokens = repeat(self.latent_tokens + self.token_positions, "l c -> n l c", n=len(frames))  # (N, L, C)
        x = self.stem(patches, self.patch_positions, tokens)  # (N, 1 + P + L, C)
        for block in self.blocks:
            x = block(x)  # (N, 1 + P + L, C)
        x = self.norm(x[:, 1 + patches.shape[1] :])  # (N, L, C)
        return self.moments(scramble(x))  # (N, L, 2 D)


def scramble(x: Tensor) -> Tensor:
    """``x (N, L, C)`` read as if it were stored as ``(N, C, L)``.

    TiTok-L-32 and the authors' code reshape where they should transpose; their weights need the same.
    """
    flat = rearrange(x, "n l c -> n (l c)")
    return rearrange(flat, "n (c l) -> n l c", l=x.shape[1])


class ClipAttention(nn.Module):
    """Causal attention within a clip of W frames, before each block; its output starts at zero.

    First each patch reads the same patch of earlier frames (fine). Then patches and latent tokens read the latent
    tokens of earlier frames (coarse). Both include their own frame.
    """

    def __init__(self, config: UpstreamAutoencoderConfig) -> None:
        super().__init__()
        self.fine_norm = nn.LayerNorm(config.width)
        self.fine = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(config.width) for _ in range(3))
        self.coarse = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)

    def zero_output(self) -> None:
        """Makes the layer add nothing."""
        for attention in (self.fine, self.coarse):
            nn.init.zeros_(attention.out_proj.weight)

    def forward(self, patches: Tensor, tokens: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mixes the next F frames of a clip.

        Args:
            patches: ``(B, F, P, C)``.
            tokens: Latent tokens ``(B, F, L, C)``.
            past: The third result of the call for the frames before; empty at the beginning of a clip.

        Returns:
            Patches and latent tokens after attention, and what the layer has read of the clip so far: patches
            ``(B, S, P, C)`` and latent tokens ``(B, S, L, C)``.
        """
        clip = [patches, tokens]
        if past:
            clip = [torch.cat(pair, dim=1) for pair in zip(past, clip, strict=True)]
        frames, total = patches.shape[1], clip[0].shape[1]
        frame = torch.arange(total, device=patches.device)
        hidden = frame > frame[total - frames :, None]  # (F, S)

        query, keys = (rearrange(self.fine_norm(x), "b f p c -> (b p) f c") for x in (patches, clip[0]))
        mixed, _ = self.fine(query, keys, keys, attn_mask=hidden, need_weights=False)  # (B P, F, C)
        patches = patches + rearrange(mixed, "(b p) f c -> b f p c", b=len(patches))  # (B, F, P, C)

        x = torch.cat([tokens, patches], dim=2)  # (B, F, L + P, C)
        query = rearrange(self.query_norm(x), "b f q c -> b (f q) c")
        keys, values = (rearrange(norm(clip[1]), "b s l c -> b (s l) c") for norm in (self.key_norm, self.value_norm))
        mask = repeat(hidden, "f s -> (f q) (s l)", q=x.shape[2], l=tokens.shape[2])
        mixed, _ = self.coarse(query, keys, values, attn_mask=mask, need_weights=False)  # (B, F (L + P), C)
        x = x + rearrange(mixed, "b (f q) c -> b f q c", f=frames)  # (B, F, L + P, C)
        tokens, patches = x.split([tokens.shape[2], patches.shape[2]], dim=2)
        return patches, tokens, clip


class UpstreamDecoder(Decoder):
    """The standard decoder with TiTok's stem, attention within clips, and convolutional pixels.

    A longer video is decoded as clips of W frames that do not see one another.
    """

    config: UpstreamAutoencoderConfig

    def __init__(self, config: UpstreamAutoencoderConfig) -> None:
        super().__init__(config)
        self.stem = add_stem(self)
        layers = config.depth if config.temporal == "clip" else 0
        self.temporal = nn.ModuleList(ClipAttention(config) for _ in range(layers))
        del self.patch_out
        self.pixels = ConvolutionalPixels(config)
        self.sizes = [1, config.num_patches, config.num_tokens]  # class token, patches, latent tokens

    @property
    def last_layer(self) -> nn.Module:
        """The layer that outputs pixels."""
        return self.pixels.conv_out

    def forward(self, latents: Tensor, cache: DecoderCache | None, temporal: bool, shape: Resolution) -> Tensor:
        """Decodes frames that continue those of earlier calls with the same ``cache``.

        ``temporal=False`` decodes each frame alone. There is one ``shape`` only.
        """
        tokens = self.token_in(latents) + self.token_positions  # (B, F, L, C)
        if temporal and self.temporal:
            clips = self._decode_clips(tokens, cache)
            return torch.cat([self._frames(x, len(latents)) for x in clips], dim=1)  # (B, F, 3, H, W)
        x = self._embed(tokens)  # (N, 1 + P + L, C)
        for block in self.blocks:
            x = block(x)  # (N, 1 + P + L, C)
        return self._frames(x, len(latents))  # (B, F, 3, H, W)

    def _embed(self, tokens: Tensor) -> Tensor:
        """The input of the first block, ``(B, F, L, C) -> (N, 1 + P + L, C)``."""
        tokens = rearrange(tokens, "b f l c -> (b f) l c")
        patches = repeat(self.placeholder, "c -> n p c", n=len(tokens), p=self.sizes[1])
        return self.stem(patches, self.patch_positions, tokens)

    def _decode_clips(self, tokens: Tensor, cache: DecoderCache | None) -> Iterator[Tensor]:
        """Splits ``tokens (B, F, L, C)`` where clips end, and decodes each part to ``(N, 1 + P + L, C)``.

        The cache holds two tensors per layer, the third result of :class:`ClipAttention`, until the clip ends.
        """
        past = [] if cache is None else cache.tensors
        while tokens.shape[1]:
            capacity = self.config.temporal_window - (past[0].shape[1] if past else 0)
            part, tokens = tokens[:, :capacity], tokens[:, capacity:]
            x, past = self._decode_clip(part, past, keep=cache is not None and part.shape[1] < capacity)
            yield x
        if cache is not None:
            cache.tensors = past

    def _decode_clip(self, tokens: Tensor, past: list[Tensor], keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Decodes frames of one clip, ``(B, F, L, C) -> (N, 1 + P + L, C)``; ``keep`` returns the clip so far."""
        x, clip_so_far = self._embed(tokens), list[Tensor]()
        for layer, (block, attention) in enumerate(zip(self.blocks, self.temporal, strict=True)):
            x = rearrange(x, "(b f) p c -> b f p c", b=len(tokens))  # (B, F, 1 + P + L, C)
            class_token, patches, own = x.split(self.sizes, dim=2)
            patches, own, clip = attention(patches, own, past[2 * layer : 2 * layer + 2])
            if keep:
                clip_so_far += [tensor.detach() for tensor in clip]
            x = torch.cat([class_token, patches, own], dim=2)  # (B, F, 1 + P + L, C)
            x = block(rearrange(x, "b f p c -> (b f) p c"))  # (N, 1 + P + L, C)
        return x, clip_so_far

    def _frames(self, x: Tensor, batch: int) -> Tensor:
        """Pixels of the decoded patches, ``(N, 1 + P + L, C) -> (B, F, 3, H, W)``."""
        _, patches, _ = x.split(self.sizes, dim=1)
        return rearrange(self.pixels(self.norm(patches)), "(b f) c h w -> b f c h w", b=batch)


class UpstreamAutoencoder(ARAutoencoder):
    """The AR-VAE as the authors' checkpoints need it.

    Its networks work on pixels in [0, 1]; video in and out is in [-1, 1], as everywhere. The diffusion model and the
    decoder get latent tokens scaled to length 1.
    """

    encoder_class = UpstreamEncoder
    decoder_class = UpstreamDecoder
    config: UpstreamAutoencoderConfig

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of every frame of ``video (B, F, 3, H, W)``. Each frame is encoded alone."""
        return super().encode((video + 1) / 2)

    def latents(self, video: Tensor) -> Tensor:
        """The latents ``(B, F, L, D)`` of ``video`` that a diffusion model learns: means of length 1."""
        return nn.functional.normalize(super().latents(video), dim=-1)

    def decode(
        self,
        latents: Tensor,
        cache: DecoderCache | None = None,
        temporal: bool = True,
        shape: Resolution | None = None,
    ) -> Tensor:
        """The frames ``(B, F, 3, H, W)`` of ``latents (B, F, L, D)``, scaled to length 1 first; not clamped.

        Frame i depends on the latents of the frames of its clip up to i. With a ``cache``, the latents continue those
        of earlier calls. ``temporal=False`` decodes each frame alone.
        """
        return 2 * super().decode(nn.functional.normalize(latents, dim=-1), cache, temporal, shape) - 1
