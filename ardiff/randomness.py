"""Explicit randomness: every random number comes from a generator keyed by its purpose, never from a global one.

Training is keyed by (purpose, seed, step, sample), the noise of a video by (purpose, seed, frame). So random numbers
depend neither on the rest of a batch, nor on the number of workers, nor on a restart.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed, the hash of ``key``: equal keys give equal seeds, different keys unrelated ones."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by ``key``. Draw on the CPU and move the result: then every device gets the same."""
    return torch.Generator().manual_seed(derive_seed(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded by ``key``."""
    return np.random.Generator(np.random.PCG64(derive_seed(*key)))


class BatchGenerator:
    """Random numbers of the local samples of a batch that is split over workers and micro-batches.

    Every sample has a generator of its own, keyed by its index in the whole batch. So samples never share random
    numbers, those of a sample depend neither on the number of workers nor on the micro-batches, and no worker draws
    for the samples of another.
    """

    def __init__(self, *key: int | str, first: int = 0) -> None:
        """
        Args:
            key: The purpose, and what tells one batch from the next, such as seed and step.
            first: Index of the first local sample in the whole batch.
        """
        self.key, self.first = key, first
        self._generators: list[torch.Generator] = []

    def generators(self, count: int) -> list[torch.Generator]:
        """The CPU generators of the first ``count`` local samples. They advance with every draw."""
        for index in range(len(self._generators), count):
            self._generators.append(torch_generator(*self.key, self.first + index))
        return self._generators[:count]

    def __call__(self, count: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """``draw(generator)``, ``(...)``, of each of the first ``count`` local samples: ``(count, ...)``."""
        return torch.stack([draw(generator) for generator in self.generators(count)])
