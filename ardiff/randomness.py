"""Explicit randomness: every draw comes from a generator that its purpose names, never from a global one.

A training draw is keyed by (seed, purpose, step, rank), a sample's noise by (seed, purpose, frame). The result of a
draw therefore depends neither on the batch it is in, nor on the number of workers, nor on a restart.
"""

import hashlib

import numpy as np
import torch


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
