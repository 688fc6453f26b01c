"""Attention of all requests whose caches have the same capacity in one call.

Shapes: P sequences of these requests, N packed frames evaluated now, F frames of the request that has most of them,
H heads, L tokens per frame, K head width, R frames of a cache's capacity, M condition tokens before them (often none).
Frames are packed one request after another, frame by frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.dit.attention import is_visible
from ardiff.sampling.cache import FrameCache, Frames
from ardiff.tensors import to_device


@dataclass(frozen=True, slots=True, eq=False)
class StackSlots:
    """Slots of the N packed frames of an iteration in a stack of P sequences that evaluate up to F frames each. The
    shapes depend only on N, F and the stack."""

    rows: Tensor
    """int64 ``(N,)``: the sequence of each frame in the stack."""
    frames: Tensor
    """int64 ``(N,)``: which of the evaluated frames of its sequence it is."""
    tokens: Tensor
    """int64 ``(N, L)``: the slots of its tokens, after those of the condition."""
    packed: Tensor
    """int64 ``(P, F)``: the packed frame of each, any one for those that a sequence does not have."""
    bias: Tensor
    """``(P, 1, F L, M + R L)``: 0 where a token sees a cached one, minus infinity elsewhere."""


class StackedAttention:
    """Attention of all requests with caches of equal capacity in one call under a mask.

    The caches become parts of common tensors, one layer after the other. Requests pad one another to equal numbers of
    frames, so results depend on other requests by rounding.
    """

    def __init__(self, caches: Sequence[FrameCache]) -> None:
        self.caches = caches
        layers = range(len(caches[0].keys))
        self.keys = [_join([cache.keys for cache in caches], layer) for layer in layers]
        self.values = [_join([cache.values for cache in caches], layer) for layer in layers]
        self.last: tuple[list[Frames], StackSlots] | None = None

    def prepare(self, frames: Sequence[Frames]) -> int:
        pairs = zip(self.caches, frames, strict=True)
        spans = [(first - cache.base, end - cache.base) for cache, (first, end) in pairs]
        if self.last is None or self.last[0] != spans:  # a frame has started or finished
            self.last = spans, self._slots(spans)
        return len(self.last[1].rows)

    def _slots(self, spans: list[Frames]) -> StackSlots:
        cache, device = self.caches[0], self.keys[0].device
        places, first_row = list[tuple[int, int, int]](), 0
        for own, (first, end) in zip(self.caches, spans, strict=True):
            of_request = range(first_row, first_row + own.sequences)
            places += [(row, slot - first, slot) for slot in range(first, end) for row in of_request]
            first_row = of_request.stop
        rows, frames, slots = to_device(torch.tensor(places), device).unbind(dim=1)  # (N,) each
        packed = rows.new_zeros(first_row, max(end - first for first, end in spans))  # (P, F)
        packed.index_put_((rows, frames), torch.arange(len(places), device=device))
        lag = slots[packed][..., None] - torch.arange(cache.capacity, device=device)  # (P, F, R)
        seen = repeat(is_visible(lag, cache.band), "p f r -> p 1 (f lq) (r lk)", lq=cache.tokens, lk=cache.tokens)
        seen = nn.functional.pad(seen, (cache.prefix, 0), value=True)
        bias = torch.zeros(seen.shape, dtype=self.keys[0].dtype, device=device).masked_fill_(~seen, -torch.inf)
        tokens = cache.prefix + slots[:, None] * cache.tokens + torch.arange(cache.tokens, device=device)  # (N, L)
        return StackSlots(rows, frames, tokens, packed, bias)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.last is not None
        slots, keys, values = self.last[1], self.keys[layer], self.values[layer]  # (P, H, M + R L, K) each
        for cached, new in ((keys, k), (values, v)):
            by_token = rearrange(cached, "p h t k -> p t h k")
            by_token.index_put_((slots.rows[:, None], slots.tokens), rearrange(new, "n h l k -> n l h k"))
        q = rearrange(q, "n h l k -> n l h k")[slots.packed]  # (P, F, L, H, K)
        q = rearrange(q, "p f l h k -> p h (f l) k")
        output = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=slots.bias)
        output = rearrange(output, "p h (f l) k -> p f l h k", l=k.shape[2])[slots.rows, slots.frames]  # (N, L, H, K)
        return rearrange(output, "n l h k -> n h l k")


def _join(lists: list[list[Tensor]], layer: int) -> Tensor:
    """Joins the tensors ``(B, ...)`` of a layer into one ``(P, ...)``, of which they become parts."""
    whole = torch.cat([tensors[layer] for tensors in lists])
    parts = whole.split([len(tensors[layer]) for tensors in lists])
    for tensors, part in zip(lists, parts, strict=True):
        tensors[layer] = part
    return whole
