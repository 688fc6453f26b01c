"""Training timesteps: the Frame-oriented Probability Propagation (FoPP) law of Sec. 3.3 and the laws beside it.

Shapes: B batch, F frames, T timesteps; timesteps ``(B, F)`` int64, 0-based ``0..T-1``.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

TimestepSampling = Literal["fopp", "synchronous", "independent", "uniform_from_first"]


def sample_timesteps(
    law: TimestepSampling, batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator
) -> Tensor:
    """BatchGenerator one timestep per frame for every clip of a batch.

    Args:
        law: ``fopp``: an anchor frame and its timestep are uniform, the rest is uniform among the non-decreasing
            compositions through it (Alg. 1). ``synchronous``: one uniform timestep a clip. ``independent``: a uniform
            timestep a frame (Diffusion Forcing). ``uniform_from_first``: the naive scheme of Sec. 3.3, in which each
            frame is uniform between its predecessor's timestep and T-1.
        batch_size: B. num_frames: F. num_timesteps: T.
        generator: A CPU generator, the only source of randomness.

    Returns:
        int64 ``(B, F)`` on the CPU; never decreasing along frames, except under ``independent``.

    Raises:
        ValueError: An unknown law or a size below 1.
    """
    if min(batch_size, num_frames, num_timesteps) < 1:
        raise ValueError(f"sizes must be at least 1, got {batch_size=}, {num_frames=}, {num_timesteps=}")
    match law:
        case "fopp":
            return _fopp(batch_size, num_frames, num_timesteps, generator)
        case "synchronous":
            drawn = torch.randint(num_timesteps, (batch_size, 1), generator=generator)
            return drawn.expand(batch_size, num_frames).clone()
        case "independent":
            return torch.randint(num_timesteps, (batch_size, num_frames), generator=generator)
        case "uniform_from_first":
            return _uniform_from_first(batch_size, num_frames, num_timesteps, generator)
        case _:
            raise ValueError(f"unknown timestep law {law!r}: choose from {', '.join(get_args(TimestepSampling))}")


def _fopp(batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Alg. 1 without its tables: prefix and suffix of the anchor are uniform multisets, drawn by stars and bars.

    The dynamic programme of Sec. 3.3 counts the non-decreasing paths through (frame, timestep); walking it forwards
    and backwards from the anchor draws uniformly among them, which is what a uniform multiset does at once. (Printed,
    both recursions are the same; the suffix table has to add (i, j+1) and (i+1, j).)
    """
    anchor = torch.randint(num_frames, (batch_size, 1), generator=generator)  # (B, 1)
    anchor_t = torch.randint(num_timesteps, (batch_size, 1), generator=generator)  # (B, 1)
    before = _uniform_multiset(anchor, anchor_t, num_frames - 1, num_timesteps, generator)  # (B, F-1)
    after = anchor_t + _uniform_multiset(
        num_frames - 1 - anchor, num_timesteps - 1 - anchor_t, num_frames - 1, num_timesteps, generator
    )
    frame = torch.arange(num_frames).expand(batch_size, -1)  # (B, F)
    padded_before = torch.cat([before, anchor_t], dim=1)
    padded_after = torch.cat([after, anchor_t], dim=1)
    prefix = padded_before.gather(1, frame)
    suffix = padded_after.gather(1, (frame - anchor - 1).clamp(min=0))
    return torch.where(frame < anchor, prefix, torch.where(frame > anchor, suffix, anchor_t))


def _uniform_multiset(
    size: Tensor, largest: Tensor, width: int, num_timesteps: int, generator: torch.Generator
) -> Tensor:
    """Row-wise uniform multisets of ``size`` values in ``0..largest``, sorted; ``size``, ``largest`` are ``(B, 1)``.

    Multisets of n values in 0..m are the n-subsets of m+n items: sort a subset and subtract 0, 1, ..., n-1. The subset
    is the n smallest of m+n random keys. Returns ``(B, width)``; the entries from ``size`` on mean nothing.
    """
    if width == 0:
        return torch.empty(len(size), 0, dtype=torch.int64)
    item = torch.arange(num_timesteps + width - 1)
    keys = torch.rand(len(size), len(item), dtype=torch.float64, generator=generator)
    keys = keys.masked_fill(item >= largest + size, 2.0)
    chosen = keys.topk(width, dim=1, largest=False).indices  # (B, width)
    place = torch.arange(width)
    chosen = chosen.masked_fill(place >= size, len(item))
    return chosen.sort(dim=1).values - place


def _uniform_from_first(batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    share = torch.rand(num_frames, batch_size, dtype=torch.float64, generator=generator)
    columns = [(share[0] * num_timesteps).long()]
    for frame in range(1, num_frames):
        previous = columns[-1]
        columns.append(previous + (share[frame] * (num_timesteps - previous)).long())
    return torch.stack(columns, dim=1)
