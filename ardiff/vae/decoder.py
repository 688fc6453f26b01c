"""The decoder of the AR-VAE: patch placeholders that read their own frame's latent tokens and those of earlier frames.

Shapes: B batch, F frames, N = B F packed frames, P patches a frame, L latent tokens, D latent width, C width,
W frames of the temporal window, H heads, K head width.
"""

from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.vae.config import AutoencoderConfig
from ardiff.vae.encoder import FrameBlock, Stem, patch_positions
from ardiff.vae.pixels import ConvolutionalPixels
from ardiff.vae.temporal import ClipAttention, DecoderCache, Known, TemporalAttention


class Decoder(nn.Module):
    """Latents ``(B, F, L, D)`` to frames ``(B, F, 3, H, W)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.window = config.temporal_window
        self.side = config.resolution // config.patch_size
        self.token_in = nn.Linear(config.token_dim, config.width)
        self.token_positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.placeholder = nn.Parameter(0.02 * torch.randn(config.width))
        self.patch_positions = nn.Parameter(patch_positions(config))
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(FrameBlock(config) for _ in range(config.depth))
        self.temporal_kind = config.temporal
        match config.temporal:
            case "window":
                self.temporal = nn.ModuleList(TemporalAttention(config) for _ in range(config.depth))
            case "clip":
                self.temporal = nn.ModuleList(ClipAttention(config) for _ in range(config.depth))
            case "none":
                self.temporal = nn.ModuleList()
        self.norm = nn.LayerNorm(config.width)
        self.pixels: ConvolutionalPixels | None = None
        match config.pixels:
            case "linear":
                self.patch_out = nn.Linear(config.width, 3 * config.patch_size**2)
            case "convolutional":
                self.pixels = ConvolutionalPixels(config)

    def zero_temporal_output(self) -> None:
        """Makes temporal attention add nothing, so that a decoder of single frames turns into one of clips smoothly."""
        for attention in self.temporal:
            attention.zero_output()  # type: ignore[operator]

    @property
    def last_layer(self) -> nn.Module:
        """The layer that puts out pixels."""
        return self.patch_out if self.pixels is None else self.pixels.conv_out

    def forward(self, latents: Tensor, cache: DecoderCache | None = None, temporal: bool = True) -> Tensor:
        tokens = self.token_in(latents) + self.token_positions  # (B, F, L, C)
        match self.temporal_kind if temporal else "none":
            case "window":
                return self._pixels(self._decode_windows(tokens, cache), len(tokens))
            case "clip":
                return torch.cat([self._pixels(x, len(tokens)) for x in self._clips(tokens, cache)], dim=1)
            case _:
                x = self._enter(tokens)
                for block in self.blocks:
                    x = block(x)
                return self._pixels(x, len(tokens))

    def _enter(self, tokens: Tensor) -> Tensor:
        """Placeholders of all patches, then latent tokens: ``(B, F, L, C) -> (N, P + L, C)``."""
        tokens = rearrange(tokens, "b f l c -> (b f) l c")
        placeholders = repeat(self.placeholder, "c -> n p c", n=len(tokens), p=self.side**2)
        return self.stem(placeholders, self.patch_positions, tokens)

    def _decode_windows(self, tokens: Tensor, cache: DecoderCache | None) -> Tensor:
        """All blocks, each after reading the latent tokens of the last W frames: ``(B, F, L, C) -> (N, P + L, C)``."""
        history, visible = self._windows(tokens, cache)
        x = self._enter(tokens)
        for block, attention in zip(self.blocks, self.temporal, strict=True):
            patches, own = x[:, : -tokens.shape[2]], x[:, -tokens.shape[2] :]
            x = block(torch.cat([patches + attention(patches, history, visible), own], dim=1))
        return x

    def _clips(self, tokens: Tensor, cache: DecoderCache | None) -> Iterator[Tensor]:
        """The frames parted where a clip of W frames ends, each part decoded: ``(N, P + L, C)``."""
        known = [] if cache is None else cache.clip
        while tokens.shape[1]:
            room = self.window - (known[0][0].shape[1] if known else 0)
            part, tokens = tokens[:, :room], tokens[:, room:]
            x, seen = self._decode_clip(part, known, remember=cache is not None and part.shape[1] < room)
            known[:] = seen
            yield x

    def _decode_clip(self, tokens: Tensor, known: list[Known], remember: bool) -> tuple[Tensor, list[Known]]:
        """All blocks, each after reading what of the clip is ``known``: ``(B, F, L, C) -> (N, P + L, C)``.

        And what each layer knows then, if it is to ``remember`` that.
        """
        x, seen = self._enter(tokens), []
        head = len(self.patch_positions) - self.side**2  # a class token, which reads nothing
        for layer, (block, attention) in enumerate(zip(self.blocks, self.temporal, strict=True)):
            x = rearrange(x, "(b f) p c -> b f p c", b=len(tokens))
            first, patches, own = x.split([head, self.side**2, tokens.shape[2]], dim=2)
            patches, own, now = attention(patches, own, known[layer] if known else None)
            if remember:
                seen.append((now[0].detach(), now[1].detach()))
            x = block(rearrange(torch.cat([first, patches, own], dim=2), "b f p c -> (b f) p c"))
        return x, seen

    def _pixels(self, x: Tensor, batch: int) -> Tensor:
        """Pixels of the decoded patches, ``(N, P + L, C) -> (B, F, 3, H, W)``."""
        first = len(self.patch_positions) - self.side**2
        x = self.norm(x[:, first : first + self.side**2])
        if self.pixels is not None:
            return rearrange(self.pixels(x), "(b f) c h w -> b f c h w", b=batch)
        return rearrange(
            self.patch_out(x),  # (N, P, 3 p q)
            "(b f) (h w) (p q c) -> b f c (h p) (w q)",
            b=batch,
            h=self.side,
            p=self.patch_size,
            q=self.patch_size,
        )

    def _windows(self, tokens: Tensor, cache: DecoderCache | None) -> tuple[Tensor, Tensor]:
        """Latent tokens of the last W frames of every frame, ``(N, W, L, C)``, and which exist, bool ``(N, W)``."""
        batch, frames = tokens.shape[:2]
        past = tokens[:, :0] if cache is None or cache.tokens is None else cache.tokens
        known = torch.cat([past, tokens], dim=1)  # (B, past + F, L, C)
        if cache is not None:
            cache.tokens = known[:, max(known.shape[1] - self.window + 1, 0) :].detach()
        missing = self.window - 1 - past.shape[1]
        padded = nn.functional.pad(known, (0, 0, 0, 0, missing, 0))  # (B, W - 1 + F, L, C)
        windows = rearrange(padded.unfold(1, self.window, 1), "b f l c w -> (b f) w l c")
        slot = torch.arange(self.window, device=tokens.device)
        frame = torch.arange(frames, device=tokens.device)
        visible = slot >= missing - frame[:, None]  # (F, W)
        return windows, repeat(visible, "f w -> (b f) w", b=batch)
