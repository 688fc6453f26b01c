"""Sampling of training timesteps: Frame-oriented Probability Propagation (FoPP, Sec. 3.3) and its alternatives.

Shapes: B clips, F frames, T timesteps; timesteps int64 ``(B, F)``, 0-based ``0..T-1``.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

TimestepSampling = Literal["fopp", "synchronous", "independent", "uniform_from_first"]


def sample_timesteps(
    method: TimestepSampling, batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator
) -> Tensor:
    """Samples one timestep per frame for every clip of a batch.

    Args:
        method: ``fopp``: see :func:`fopp`. ``synchronous``: one uniform timestep per clip. ``independent``: one uniform
            timestep per frame (Diffusion Forcing). ``uniform_from_first``: see :func:`uniform_from_first`.
        batch_size: B. num_frames: F. num_timesteps: T.
        generator: A CPU generator, the only source of randomness.

    Returns:
        int64 ``(B, F)`` on the CPU; non-decreasing along frames, except with ``independent``.

    Raises:
        ValueError: An unknown method or a size below 1.
    """
    if min(batch_size, num_frames, num_timesteps) < 1:
        raise ValueError(f"sizes must be at least 1, got {batch_size=}, {num_frames=}, {num_timesteps=}")
    match method:
        case "fopp":
            return fopp(batch_size, num_frames, num_timesteps, generator)
        case "synchronous":
            timesteps = torch.randint(num_timesteps, (batch_size, 1), generator=generator)  # (B, 1)
            return timesteps.expand(batch_size, num_frames).clone()
        case "independent":
            return torch.randint(num_timesteps, (batch_size, num_frames), generator=generator)
        case "uniform_from_first":
            return uniform_from_first(batch_size, num_frames, num_timesteps, generator)
        case _:
            raise ValueError(
                f"unknown timestep sampling {method!r}: choose from {', '.join(get_args(TimestepSampling))}"
            )


def fopp(batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """FoPP (Alg. 1): an anchor frame and its timestep are uniform; the rest is uniform among non-decreasing timesteps.

    The paper counts the non-decreasing paths through each (frame, timestep) in a table and walks it backwards and
    forwards from the anchor. That samples uniformly among them, as does a uniform sorted multiset, which needs no table
    that overflows. (Printed, both recursions are the same; the suffix table has to add (i, j+1) and (i+1, j).)
    """
    anchor = torch.randint(num_frames, (batch_size, 1), generator=generator)  # (B, 1)
    anchor_t = torch.randint(num_timesteps, (batch_size, 1), generator=generator)  # (B, 1)
    before = _uniform_multiset(anchor, anchor_t, num_frames - 1, num_timesteps, generator)  # (B, F - 1)
    after = anchor_t + _uniform_multiset(
        num_frames - 1 - anchor, num_timesteps - 1 - anchor_t, num_frames - 1, num_timesteps, generator
    )  # (B, F - 1)
    frame = torch.arange(num_frames).expand(batch_size, -1)  # (B, F)
    prefix = torch.cat([before, anchor_t], dim=1).gather(1, frame)  # (B, F)
    suffix = torch.cat([after, anchor_t], dim=1).gather(1, (frame - anchor - 1).clamp(min=0))  # (B, F)
    return torch.where(frame < anchor, prefix, torch.where(frame > anchor, suffix, anchor_t))


def _uniform_multiset(
    size: Tensor, largest: Tensor, width: int, num_timesteps: int, generator: torch.Generator
) -> Tensor:
    """Sorted uniform multisets, one per clip, of ``size`` values in ``0..largest``; both are ``(B, 1)``.

    Multisets of n values in 0..m correspond to n-subsets of m + n items (stars and bars): sort a subset and subtract
    0, 1, ..., n - 1. A uniform subset is the n items with the smallest of m + n random keys.

    Returns:
        ``(B, width)``; the entries from ``size`` on have no meaning.
    """
    if width == 0:
        return torch.empty(len(size), 0, dtype=torch.int64)
    item = torch.arange(num_timesteps + width - 1)
    keys = torch.rand(len(size), len(item), dtype=torch.float64, generator=generator)  # (B, items)
    keys = keys.masked_fill(item >= largest + size, 2.0)
    chosen = keys.topk(width, dim=1, largest=False).indices  # (B, width)
    index = torch.arange(width)
    chosen = chosen.masked_fill(index >= size, len(item))
    return chosen.sort(dim=1).values - index


def uniform_from_first(batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """The naive scheme of Sec. 3.3: each frame is uniform between the previous frame's timestep and T - 1."""
    share = torch.rand(num_frames, batch_size, dtype=torch.float64, generator=generator)  # (F, B)
    columns = [(share[0] * num_timesteps).long()]  # (B,) each
    for frame in range(1, num_frames):
        previous = columns[-1]
        columns.append(previous + (share[frame] * (num_timesteps - previous)).long())
    return torch.stack(columns, dim=1)
