"""Keys and values of the frames of one request.

Shapes: B sequences of the request (videos, times two with guidance), H heads, L tokens per frame, K head width,
R frames of the cache's capacity, M condition tokens before them (often none).
"""

import torch
from torch import Tensor

from ardiff.dit import DiTConfig

Frames = tuple[int, int]
"""The first of consecutive frames of a request, and the one after the last."""


class FrameCache:
    """Preallocated keys and values of ``capacity`` consecutive frames; frame f has slot ``f - base``.

    With strict temporal causality the keys and values of a clean frame are final, so they are computed once.
    """

    def __init__(
        self,
        config: DiTConfig,
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """``prefix``: for each block, keys and values ``(B, H, M, K)`` of condition tokens, which all frames see."""
        self.sequences, self.capacity, self.base = sequences, capacity, 0
        self.tokens, self.prefix, self.band = config.num_tokens, config.prefix_tokens, config.attention_window
        heads, width = config.num_heads, config.width // config.num_heads
        shape = (sequences, heads, self.prefix + capacity * config.num_tokens, width)
        # Zeros: the mask gives slots that are still empty a weight of zero, and zero times NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        for layer, (keys, values) in enumerate(prefix or []):
            self.keys[layer][:, :, : self.prefix], self.values[layer][:, :, : self.prefix] = keys, values

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
