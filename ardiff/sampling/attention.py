"""Attention of the frames that an iteration evaluates to the frames that a request has in its cache.

Shapes: B sequences of a request, F frames evaluated now, H heads, L tokens per frame, K head width, R frames of a
cache's capacity, M condition tokens before them (often none). Frames are packed as ``(F B)``, frame by frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.dit.attention import is_visible
from ardiff.sampling.cache import FrameCache, Frames
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


class RequestAttention:
    """Attention of one request, with any backend but ``stacked``; see :class:`ardiff.sampling.groups.Attention`."""

    slots: CacheSlots | None = None

    def __init__(self, cache: FrameCache, backend: AttentionBackend) -> None:
        self.cache, self.backend = cache, backend
        self.device = cache.keys[0].device
        self.slot_of_token = torch.arange(cache.capacity, device=self.device).repeat_interleave(cache.tokens)  # (R L,)
        self.block_masks: dict[tuple[int, int], object] = {}  # for FlexAttention, by first slot and number of tokens

    def prepare(self, frames: Sequence[Frames]) -> int:
        ((first, end),) = frames
        cache, last = self.cache, self.slots
        slot, num_tokens = first - cache.base, (end - first) * cache.tokens
        if last is None or (last.first, len(last.tokens)) != (slot, num_tokens):  # a frame has started or finished
            self.slots = self._slots(slot, num_tokens)
        return (end - first) * cache.sequences

    def _slots(self, slot: int, num_tokens: int) -> CacheSlots:
        cache, mask = self.cache, None
        tokens = torch.arange(slot * cache.tokens, slot * cache.tokens + num_tokens, device=self.device)
        if self.backend == "masked":
            mask = is_visible(self.slot_of_token[tokens][:, None] - self.slot_of_token, cache.band)
            mask = nn.functional.pad(mask, (cache.prefix, 0), value=True)
        if self.backend == "flex" and (slot, num_tokens) not in self.block_masks:
            self.block_masks[slot, num_tokens] = self._block_mask(slot, num_tokens)
        return CacheSlots(slot, tokens + cache.prefix, self.block_masks.get((slot, num_tokens), mask))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.slots is not None
        keys, values, sequences = self.cache.keys[layer], self.cache.values[layer], self.cache.sequences
        keys.index_copy_(2, self.slots.tokens, rearrange(k, "(f b) h l k -> b h (f l) k", b=sequences))
        values.index_copy_(2, self.slots.tokens, rearrange(v, "(f b) h l k -> b h (f l) k", b=sequences))
        match self.backend:
            case "ragged":
                return self._attend_ragged(q, keys, values, self.slots.first)
            case "masked":
                return self._attend_masked(q, keys, values, self.slots)
            case "flex":
                q = rearrange(q, "(f b) h l k -> b h (f l) k", b=sequences)
                output = _flex_attention(q.device.type)(q, keys, values, block_mask=self.slots.mask)
                return rearrange(output, "b h (f l) k -> (f b) h l k", l=self.cache.tokens)
            case _:
                raise ValueError(f"unknown attention_backend {self.backend!r}")

    def _attend_masked(self, q: Tensor, keys: Tensor, values: Tensor, slots: CacheSlots) -> Tensor:
        """Frames are a batch, so on CPUs the result of a frame does not depend on their number, to the last bit."""
        assert isinstance(slots.mask, Tensor)
        mask = rearrange(slots.mask, "(f l) r -> f 1 l r", l=self.cache.tokens)
        outputs = []
        for sequence in range(len(keys)):
            k, v = (tensor[sequence].expand(len(mask), -1, -1, -1) for tensor in (keys, values))
            query = q[sequence :: len(keys)]  # (F, H, L, K)
            outputs.append(nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask))
        return rearrange(outputs, "b f h l k -> (f b) h l k")

    def _attend_ragged(self, q: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        outputs = []
        for slot, query in enumerate(q.split(keys.shape[0]), first):
            oldest = 0 if self.cache.band is None else max(0, slot - self.cache.band + 1)
            first, end = (self.cache.prefix + frame * self.cache.tokens for frame in (oldest, slot + 1))
            seen_keys, seen_values = (self._span(tensor, first, end) for tensor in (keys, values))
            outputs.append(nn.functional.scaled_dot_product_attention(query, seen_keys, seen_values))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _span(self, tensor: Tensor, first: int, end: int) -> Tensor:
        """The condition tokens and the tokens ``first .. end - 1`` of keys or values ``(B, H, M + R L, K)``."""
        prefix = self.cache.prefix
        if first == prefix or not prefix:
            return tensor[:, :, first - prefix : end]
        return torch.cat([tensor[:, :, :prefix], tensor[:, :, first:end]], dim=2)

    def _block_mask(self, slot: int, queries: int) -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        tokens, band, prefix = self.cache.tokens, self.cache.band, self.cache.prefix
        offset = torch.tensor(slot, device=self.device)  # a Python number would be compiled in

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return is_visible(offset + query // tokens - (key - prefix) // tokens, band) | (key < prefix)

        keys = prefix + self.cache.capacity * tokens
        return create_block_mask(visible, None, None, queries, keys, device=str(self.device))


@lru_cache(maxsize=2)
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """FlexAttention for a type of device. Imported on first use: importing the compiler takes seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    # torch 2.13 cannot compile it for a CPU with dynamic shapes.
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]
