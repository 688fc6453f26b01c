"""Sampling of training timesteps: Frame-oriented Probability Propagation (FoPP, Sec. 3.3) and its alternatives.

Shapes: B clips, F frames, T timesteps; timesteps int64 ``(B, F)``, 0-based ``0..T-1``.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

TimestepSampling = Literal["fopp", "synchronous", "independent", "uniform_from_first"]


Generators = torch.Generator | Sequence[torch.Generator]
"""CPU generators, the only source of randomness: one for a batch, or one for each of its clips."""


def sample_timesteps(
    method: TimestepSampling, batch_size: int, num_frames: int, num_timesteps: int, generators: Generators
) -> Tensor:
    """Samples one timestep per frame for every clip of a batch.

    Args:
        method: ``fopp``: see :func:`fopp`. ``synchronous``: one uniform timestep per clip. ``independent``: one uniform
            timestep per frame (Diffusion Forcing). ``uniform_from_first``: see :func:`uniform_from_first`.
        batch_size: B. num_frames: F. num_timesteps: T.
        generators: With one for each clip, a clip's timesteps do not depend on the other clips.

    Returns:
        int64 ``(B, F)`` on the CPU; non-decreasing along frames, except with ``independent``.

    Raises:
        ValueError: An unknown method or a size below 1.
    """
    if min(batch_size, num_frames, num_timesteps) < 1:
        raise ValueError(f"sizes must be at least 1, got {batch_size=}, {num_frames=}, {num_timesteps=}")
    match method:
        case "fopp":
            return fopp(batch_size, num_frames, num_timesteps, generators)
        case "synchronous":
            timesteps = (uniform(batch_size, 1, generators) * num_timesteps).long()  # (B, 1)
            return timesteps.expand(batch_size, num_frames).clone()
        case "independent":
            return (uniform(batch_size, num_frames, generators) * num_timesteps).long()
        case "uniform_from_first":
            return uniform_from_first(batch_size, num_frames, num_timesteps, generators)
        case _:
            raise ValueError(
                f"unknown timestep sampling {method!r}: choose from {', '.join(get_args(TimestepSampling))}"
            )


def uniform(batch_size: int, count: int, generators: Generators) -> Tensor:
    """Uniform numbers in [0, 1), float64 ``(B, count)``."""
    if isinstance(generators, torch.Generator):
        return torch.rand(batch_size, count, dtype=torch.float64, generator=generators)
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=g) for g in generators])


def fopp(batch_size: int, num_frames: int, num_timesteps: int, generators: Generators) -> Tensor:
    """FoPP (Alg. 1): an anchor frame and its timestep are uniform; the rest is uniform among non-decreasing timesteps.

    The paper counts the non-decreasing paths through each (frame, timestep) in a table and walks it backwards and
    forwards from the anchor. That samples uniformly among them, as does a uniform sorted multiset, which needs no table
    that overflows. (Printed, both recursions are the same; the suffix table has to add (i, j+1) and (i+1, j).)
    """
    items = num_timesteps + num_frames - 2
    of_anchor, *keys = uniform(batch_size, 2 + 2 * items, generators).split([2, items, items], dim=1)
    anchor = (of_anchor[:, :1] * num_frames).long()  # (B, 1)
    anchor_t = (of_anchor[:, 1:] * num_timesteps).long()  # (B, 1)
    width = num_frames - 1
    before = _multiset(anchor, anchor_t, width, keys[0])  # (B, F - 1)
    after = anchor_t + _multiset(width - anchor, num_timesteps - 1 - anchor_t, width, keys[1])  # (B, F - 1)
    frame = torch.arange(num_frames).expand(batch_size, -1)  # (B, F)
    prefix = torch.cat([before, anchor_t], dim=1).gather(1, frame)  # (B, F)
    suffix = torch.cat([after, anchor_t], dim=1).gather(1, (frame - anchor - 1).clamp(min=0))  # (B, F)
    return torch.where(frame < anchor, prefix, torch.where(frame > anchor, suffix, anchor_t))


def _multiset(size: Tensor, largest: Tensor, width: int, keys: Tensor) -> Tensor:
    """Sorted uniform multisets, one per clip, of ``size`` values in ``0..largest``; both are ``(B, 1)``.

    Multisets of n values in 0..m correspond to n-subsets of m + n items (stars and bars): sort a subset and subtract
    0, 1, ..., n - 1. A uniform subset is the n items with the smallest of m + n random keys, the first of ``keys``.

    Returns:
        ``(B, width)``; the entries from ``size`` on have no meaning.
    """
    if width == 0:
        return torch.empty(len(size), 0, dtype=torch.int64)
    item = torch.arange(keys.shape[1])
    keys = keys.masked_fill(item >= largest + size, 2.0)  # (B, items)
    chosen = keys.topk(width, dim=1, largest=False).indices  # (B, width)
    index = torch.arange(width)
    chosen = chosen.masked_fill(index >= size, len(item))
    return chosen.sort(dim=1).values - index


def uniform_from_first(batch_size: int, num_frames: int, num_timesteps: int, generators: Generators) -> Tensor:
    """The naive scheme of Sec. 3.3: each frame is uniform between the previous frame's timestep and T - 1."""
    share = uniform(batch_size, num_frames, generators).unbind(dim=1)  # (B,) each
    columns = [(share[0] * num_timesteps).long()]  # (B,) each
    for frame in range(1, num_frames):
        previous = columns[-1]
        columns.append(previous + (share[frame] * (num_timesteps - previous)).long())
    return torch.stack(columns, dim=1)
