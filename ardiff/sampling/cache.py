"""Keys and values of the frames of one request, and attention over them.

Shapes: B sequences of the request (videos, times two with guidance), F frames evaluated now, H heads, L tokens a frame,
K head width, R frames that the cache has room for. Frames come packed as ``(F B)``, frame by frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.dit import DiTConfig
from ardiff.dit.attention import is_visible

AttentionMode = Literal["ragged", "masked", "flex"]


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the F frames of an iteration are in a cache. The shapes depend on F and on the cache's room alone."""

    first: int
    """Of the frames, counted from the beginning of the cache."""
    rows: Tensor
    """int64 ``(F L,)`` on the cache's device."""
    mask: object
    """What they see of all ``R L`` places: bool ``(F L, R L)`` for ``masked``, a BlockMask for ``flex``."""


class FrameCache:
    """Preallocated keys and values for ``room`` consecutive frames, beginning at frame ``base``.

    With strict temporal causality those of a clean frame are final, so they are computed once.
    """

    def __init__(
        self,
        config: DiTConfig,
        sequences: int,
        room: int,
        mode: AttentionMode,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``mode``: ``ragged`` is one attention call per frame without a mask, best on CPUs; ``masked`` is a single
        call with a block-causal mask, best where launching a kernel is what costs; ``flex`` is FlexAttention,
        which skips what the mask hides: compiled on GPUs, its plain reference on CPUs."""
        self.tokens, self.room, self.base = config.num_tokens, room, 0
        self.band = config.attention_window
        shape = (config.depth, sequences, config.num_heads, room * config.num_tokens, config.width // config.num_heads)
        # Zeros, since a mask hides what has not been stored yet by a weight of zero, and not a NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.mode = mode
        self.key_frames = torch.arange(room, device=device).repeat_interleave(config.num_tokens)  # (R L,)
        self.last_places: Places | None = None
        self.block_masks: dict[tuple[int, int], object] = {}  # of FlexAttention

    @staticmethod
    def num_bytes(config: DiTConfig, sequences: int, room: int, dtype: torch.dtype) -> int:
        """Memory that a cache of these sizes takes."""
        return 2 * config.depth * sequences * room * config.num_tokens * config.width * dtype.itemsize

    def restart(self, base: int) -> None:
        """Forgets everything; the cache now begins at frame ``base``."""
        self.base = base

    def make_room(self, first: int, end: int) -> None:
        """Makes sure that frames up to ``end`` fit, keeping those from ``first`` on."""
        if end - self.base <= self.room:
            return
        shift = (first - self.base) * self.tokens
        for layer in (*self.keys, *self.values):  # one by one: a copy of all would be as large as what is kept
            kept = layer[:, :, shift:].clone()
            layer[:, :, : kept.shape[2]] = kept
        self.base = first

    def places(self, first: int, end: int) -> Places:
        """Where frames ``first .. end - 1`` are; all frames from ``base`` to ``first`` must have been stored before."""
        place, last = first - self.base, self.last_places
        if last is not None and (last.first, len(last.rows)) == (place, (end - first) * self.tokens):
            return last  # no frame has started or ended
        rows = torch.arange(place * self.tokens, (end - self.base) * self.tokens, device=self.keys.device)
        match self.mode:
            case "ragged":
                mask: object = None
            case "masked":
                mask = is_visible(self.key_frames[rows][:, None] - self.key_frames, self.band)
            case "flex":
                if (place, len(rows)) not in self.block_masks:
                    self.block_masks[place, len(rows)] = self._block_mask(place, len(rows))
                mask = self.block_masks[place, len(rows)]
        self.last_places = Places(place, rows, mask)
        return self.last_places

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """Stores keys and values of the frames of an iteration, and mixes what each of them may see.

        Args:
            layer: Block of the model.
            q, k, v: ``(F B, H, L, K)``.
            places: Of the F frames.

        Returns:
            ``(F B, H, L, K)``.
        """
        keys, values = self.keys[layer], self.values[layer]
        sequences = keys.shape[0]
        keys.index_copy_(2, places.rows, rearrange(k, "(f b) h l k -> b h (f l) k", b=sequences))
        values.index_copy_(2, places.rows, rearrange(v, "(f b) h l k -> b h (f l) k", b=sequences))
        if self.mode == "ragged":
            return self._mix_ragged(q, keys, values, places.first)
        q = rearrange(q, "(f b) h l k -> b h (f l) k", b=sequences)
        if self.mode == "masked":
            assert isinstance(places.mask, Tensor)
            mixed = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=places.mask)
        else:
            mixed = _flex_attention(q.device.type)(q, keys, values, block_mask=places.mask)
        return rearrange(mixed, "b h (f l) k -> (f b) h l k", l=self.tokens)

    def _mix_ragged(self, q: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        mixed = []
        for i, query in enumerate(q.split(keys.shape[0])):
            oldest = 0 if self.band is None else max(0, place + i - self.band + 1)
            span = slice(oldest * self.tokens, (place + i + 1) * self.tokens)
            mixed.append(nn.functional.scaled_dot_product_attention(query, keys[:, :, span], values[:, :, span]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _block_mask(self, place: int, queries: int) -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        tokens, band = self.tokens, self.band
        offset = torch.tensor(place, device=self.keys.device)  # a number here would be compiled in

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return is_visible(offset + query // tokens - key // tokens, band)

        return create_block_mask(visible, None, None, queries, self.room * tokens, device=str(self.keys.device))


@lru_cache(maxsize=2)
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """FlexAttention for a type of device. Imported on use: it brings the whole compiler, seconds at every start."""
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled for a CPU with changing shapes, it does not build under torch 2.13.
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]
