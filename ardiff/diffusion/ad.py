"""Inference schedules: the Adaptive-lag (AD) scheduler of Sec. 3.4 as data.

``ar_step`` is the paper's timestep difference s, counted in sampling steps: 0 denoises all frames together
(synchronous diffusion), ``num_inference_steps`` one frame after another (auto-regression).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ardiff.diffusion.ar_step import check_ar_step


@dataclass(frozen=True, slots=True)
class ADSchedule:
    """What every iteration does to every frame. N iterations, F frames.

    Attributes:
        step_index: int64 ``(N, F)``: sampling steps that a frame has made after the iteration; 0 is noise, S clean.
        update: bool ``(N, F)``: the frames that make a step in this iteration. All others stay exactly as they are.
        window: int64 ``(N, 2)``, half-open: the frames that the model sees; None when it always sees all.
    """

    step_index: Tensor
    update: Tensor
    window: Tensor | None = None


def ad_schedule(
    num_frames: int, num_inference_steps: int, ar_step: int, window: int | None = None, num_given: int = 0
) -> ADSchedule:
    """The AD schedule in closed form: after iteration n = 1, 2, ..., frame f has made ``clamp(n - f s, 0, S)`` steps.

    Eq. 5 in step indices. With ``window``, the model sees that many frames; the window moves by one when the frame
    behind its end makes its first step, by which time the frame that leaves must be clean.

    Args:
        num_frames: F. num_inference_steps: S. ar_step: s.
        window: Frames that the model sees at once, or None for all of them.
        num_given: First frames that are given: clean from the start, never updated.

    Returns:
        The schedule; it has ``S + (F - num_given - 1) s`` iterations.

    Raises:
        ValueError: A size below 1, or an ``ar_step`` outside ``0..S`` or too small for the window; the message names
            the smallest valid one.
    """
    check_ar_step(num_frames, num_inference_steps, ar_step, window)
    if not 0 <= num_given < num_frames:
        raise ValueError(f"{num_given} given frames leave nothing to generate of {num_frames}")
    iteration = torch.arange(num_inference_steps + (num_frames - num_given - 1) * ar_step + 1)  # (N+1,)
    lag = (torch.arange(num_frames) - num_given) * ar_step  # (F,)
    index = (iteration[:, None] - lag).clamp(0, num_inference_steps)  # (N+1, F)
    index[:, :num_given] = num_inference_steps
    spans = None
    if window is not None:
        started = (index[1:] > 0).sum(dim=1)  # (N,)
        end = started.clamp(min=min(window, num_frames))
        spans = torch.stack([(end - window).clamp(min=0), end], dim=1)
    return ADSchedule(step_index=index[1:], update=index[1:] != index[:-1], window=spans)


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> Tensor:
    """The timestep of each sampling step: int64 ``(S,)``, strictly descending, within ``0..T-1``.

    Evenly spaced and shifted up by one, as in the DDIM code that the authors use, which is reproduced wherever S
    divides T. (Theirs makes more steps than asked otherwise, and leaves the range from S = T/2 + 1 on.)

    Raises:
        ValueError: S is not in ``1..T``.
    """
    if not 1 <= num_inference_steps <= num_timesteps:
        raise ValueError(f"num_inference_steps must be in 1..{num_timesteps}, got {num_inference_steps}")
    steps = torch.arange(num_inference_steps) * num_timesteps // num_inference_steps
    return (steps + (1 if num_inference_steps < num_timesteps else 0)).flip(0)
