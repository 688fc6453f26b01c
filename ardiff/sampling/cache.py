"""Keys and values of the frames of one request, and attention over them.

Shapes: B sequences of the request (videos, times two with guidance), F frames evaluated now, H heads, L tokens per
frame, K head width, R frames of the cache's capacity, M condition tokens before them (often none). Frames are packed as
``(F B)``, frame by frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.dit import DiTConfig
from ardiff.dit.attention import is_visible
from ardiff.sampling.config import AttentionBackend


@dataclass(frozen=True, slots=True, eq=False)
class CacheSlots:
    """Slots of the F frames of an iteration in a cache. The shapes depend only on F and on the cache's capacity."""

    first: int
    """Slot of the first frame."""
    tokens: Tensor
    """int64 ``(F L,)`` on the cache's device: the slots of all tokens of the frames, after those of the condition."""
    mask: object
    """Which of the ``M + R L`` cached tokens they see: bool ``(F L, M + R L)`` for ``masked``, a BlockMask for
    ``flex``."""


class FrameCache:
    """Preallocated keys and values of ``capacity`` consecutive frames; frame f has slot ``f - base``.

    With strict temporal causality the keys and values of a clean frame are final, so they are computed once.
    """

    def __init__(
        self,
        config: DiTConfig,
        sequences: int,
        capacity: int,
        attention_backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """``prefix``: for each block, keys and values ``(B, H, M, K)`` of condition tokens, which all frames see.
        ``attention_backend``: ``ragged`` makes one attention call per frame without a mask, best on CPUs;
        ``masked`` makes a single call with a block-causal mask, best where kernel launches dominate; ``flex`` is
        FlexAttention, which skips masked blocks: compiled on GPUs, the plain reference on CPUs."""
        self.tokens, self.capacity, self.base, self.prefix = config.num_tokens, capacity, 0, config.prefix_tokens
        self.band = config.attention_window
        heads, width = config.num_heads, config.width // config.num_heads
        shape = (config.depth, sequences, heads, self.prefix + capacity * config.num_tokens, width)
        # Zeros: the mask gives slots that are still empty a weight of zero, and zero times NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        for layer, (keys, values) in enumerate(prefix or []):
            self.keys[layer, :, :, : self.prefix], self.values[layer, :, :, : self.prefix] = keys, values
        self.attention_backend = attention_backend
        self.slot_of_token = torch.arange(capacity, device=device).repeat_interleave(config.num_tokens)  # (R L,)
        self.last_slots: CacheSlots | None = None
        self.block_masks: dict[tuple[int, int], object] = {}  # for FlexAttention, by first slot and number of tokens

    @staticmethod
    def num_bytes(config: DiTConfig, sequences: int, capacity: int, dtype: torch.dtype) -> int:
        """Memory of a cache of these sizes."""
        tokens = config.prefix_tokens + capacity * config.num_tokens
        return 2 * config.depth * sequences * tokens * config.width * dtype.itemsize

    def restart(self, base: int) -> None:
        """Slot 0 now is that of frame ``base``. Slots keep what they hold until it is overwritten: the first ones may
        stay as an attention sink."""
        self.base = base

    def move(self, base: int) -> None:
        """Makes slot 0 that of frame ``base``, and keeps the frames from there on."""
        if base == self.base:
            return
        shift = (base - self.base) * self.tokens
        for layer in (*self.keys, *self.values):  # one at a time, to copy one layer only
            remaining = layer[:, :, self.prefix + shift :].clone()
            layer[:, :, self.prefix : self.prefix + remaining.shape[2]] = remaining
        self.base = base

    def slots(self, first: int, end: int) -> CacheSlots:
        """Slots of the frames ``first .. end - 1``. All slots before them must be filled already."""
        slot, num_tokens, last = first - self.base, (end - first) * self.tokens, self.last_slots
        if last is not None and (last.first, len(last.tokens)) == (slot, num_tokens):
            return last  # no frame has started or finished
        tokens = torch.arange(slot * self.tokens, (end - self.base) * self.tokens, device=self.keys.device)
        match self.attention_backend:
            case "ragged":
                mask: object = None
            case "masked":
                mask = is_visible(self.slot_of_token[tokens][:, None] - self.slot_of_token, self.band)
                mask = nn.functional.pad(mask, (self.prefix, 0), value=True)
            case "flex":
                if (slot, num_tokens) not in self.block_masks:
                    self.block_masks[slot, num_tokens] = self._block_mask(slot, num_tokens)
                mask = self.block_masks[slot, num_tokens]
        self.last_slots = CacheSlots(slot, tokens + self.prefix, mask)
        return self.last_slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: CacheSlots) -> Tensor:
        """Stores the keys and values of the F frames, then attends to all frames that each of them may see.

        Args:
            layer: Index of the block.
            q, k, v: ``(F B, H, L, K)``.
            slots: Slots of the F frames.

        Returns:
            ``(F B, H, L, K)``.
        """
        keys, values = self.keys[layer], self.values[layer]
        sequences = keys.shape[0]
        keys.index_copy_(2, slots.tokens, rearrange(k, "(f b) h l k -> b h (f l) k", b=sequences))
        values.index_copy_(2, slots.tokens, rearrange(v, "(f b) h l k -> b h (f l) k", b=sequences))
        if self.attention_backend == "ragged":
            return self._attend_ragged(q, keys, values, slots.first)
        if self.attention_backend == "masked" and q.device.type == "cpu":
            return self._attend_framewise(q, keys, values, slots)
        q = rearrange(q, "(f b) h l k -> b h (f l) k", b=sequences)
        if self.attention_backend == "masked":
            assert isinstance(slots.mask, Tensor)
            output = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=slots.mask)
        else:
            output = _flex_attention(q.device.type)(q, keys, values, block_mask=slots.mask)
        return rearrange(output, "b h (f l) k -> (f b) h l k", l=self.tokens)

    def _attend_framewise(self, q: Tensor, keys: Tensor, values: Tensor, slots: CacheSlots) -> Tensor:
        """Frames are a batch, so on CPUs the result of a frame does not depend on their number, to the last bit."""
        assert isinstance(slots.mask, Tensor)
        mask = rearrange(slots.mask, "(f l) r -> f 1 l r", l=self.tokens)
        outputs = []
        for sequence in range(len(keys)):
            k, v = (tensor[sequence].expand(len(mask), -1, -1, -1) for tensor in (keys, values))
            query = q[sequence :: len(keys)]  # (F, H, L, K)
            outputs.append(nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask))
        return rearrange(outputs, "b f h l k -> (f b) h l k")

    def _attend_ragged(self, q: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        outputs = []
        for slot, query in enumerate(q.split(keys.shape[0]), first):
            oldest = 0 if self.band is None else max(0, slot - self.band + 1)
            first, end = (self.prefix + frame * self.tokens for frame in (oldest, slot + 1))
            seen_keys, seen_values = (self._span(tensor, first, end) for tensor in (keys, values))
            outputs.append(nn.functional.scaled_dot_product_attention(query, seen_keys, seen_values))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _span(self, tensor: Tensor, first: int, end: int) -> Tensor:
        """The condition tokens and the tokens ``first .. end - 1`` of keys or values ``(B, H, M + R L, K)``."""
        if first == self.prefix or not self.prefix:
            return tensor[:, :, first - self.prefix : end]
        return torch.cat([tensor[:, :, : self.prefix], tensor[:, :, first:end]], dim=2)

    def _block_mask(self, slot: int, queries: int) -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        tokens, band, prefix = self.tokens, self.band, self.prefix
        offset = torch.tensor(slot, device=self.keys.device)  # a Python number would be compiled in

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return is_visible(offset + query // tokens - (key - prefix) // tokens, band) | (key < prefix)

        keys = prefix + self.capacity * tokens
        return create_block_mask(visible, None, None, queries, keys, device=str(self.keys.device))


@lru_cache(maxsize=2)
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """FlexAttention for a type of device. Imported on first use: importing the compiler takes seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    # torch 2.13 cannot compile it for a CPU with dynamic shapes.
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]
