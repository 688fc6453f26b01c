"""Explicit randomness: every draw comes from a generator that its purpose names, never from a global one.

A training draw is keyed by (seed, purpose, step, rank), a sample's noise by (seed, purpose, frame). The result of a
draw therefore depends neither on the batch it is in, nor on the number of workers, nor on a restart.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that is a hash of ``key``: equal keys give equal seeds, others unrelated ones."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by ``key``. Draw on the CPU and move the result, so that every device gets the same."""
    return torch.Generator().manual_seed(derive_seed(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded by ``key``."""
    return np.random.Generator(np.random.PCG64(derive_seed(*key)))


@dataclass(frozen=True, slots=True)
class BatchGenerator:
    """The random numbers of the samples of which this process holds some.

    Every draw is made for the whole batch and cut to the samples held, so two workers never share a number, and a
    sample's numbers depend neither on the number of workers nor on the parts that a batch is cut into.
    """

    generator: torch.Generator
    """A CPU generator keyed by the step: the only source of randomness."""
    total: int | None = None
    """Samples of the whole batch; None if all of it is here."""
    first: int = 0
    """Place in the whole batch of the first sample held."""

    def __call__(self, count: int, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """The rows of the ``count`` samples held of what ``draw(samples, generator)`` gives for all of them."""
        if self.total is None:
            return draw(count, self.generator)
        return draw(self.total, self.generator)[self.first : self.first + count]
