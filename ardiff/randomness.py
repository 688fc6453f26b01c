"""Explicit randomness: every random number comes from a generator keyed by its purpose, never from a global one.

Training is keyed by (seed, purpose, step), the noise of a sample by (seed, purpose, frame). So random numbers depend
neither on the batch, nor on the number of workers, nor on a restart.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class BatchGenerator:
    """Random numbers of the local samples of a batch that is split over workers and micro-batches.

    Every draw is made for the whole batch and sliced to the local samples. So samples never share random numbers, and
    those of a sample depend neither on the number of workers nor on the micro-batch size.
    """

    generator: torch.Generator
    """A CPU generator keyed by the step, the only source of randomness."""
    total: int | None = None
    """Samples of the whole batch; None if all of them are local."""
    first: int = 0
    """Index of the first local sample in the whole batch."""

    def __call__(self, count: int, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """``draw(samples, generator)`` for the whole batch, sliced to the ``count`` local samples."""
        if self.total is None:
            return draw(count, self.generator)
        return draw(self.total, self.generator)[self.first : self.first + count]
