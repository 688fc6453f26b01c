"""Inference schedules: the Adaptive-lag (AD) scheduler of Sec. 3.4 as data.

``ar_step`` is the paper's timestep difference s, in sampling steps: 0 denoises all frames together (synchronous
diffusion), ``num_inference_steps`` one frame after another (auto-regression).

Shapes: N iterations, F frames, S sampling steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ardiff.diffusion.ar_step import check_ar_step, window_start


@dataclass(frozen=True, slots=True)
class ADSchedule:
    """What each iteration does to each frame.

    Attributes:
        step_index: int64 ``(N, F)``: sampling steps that the frame has made after the iteration; 0 is noise, S clean.
        update: bool ``(N, F)``: whether the frame makes a step in the iteration. Other frames do not change at all.
        window: int64 ``(N, 2)``, half-open: the frames that the model sees. None: it always sees all.
        sink_frames: First frames that stay when the window moves. They replace its first ones.
    """

    step_index: Tensor
    update: Tensor
    window: Tensor | None = None
    sink_frames: int = 0

    def visible(self, iteration: int) -> Tensor:
        """Indices of the frames that the model sees in an iteration, in the order of a clip, int64 ``(W,)``."""
        if self.window is None:
            return torch.arange(self.step_index.shape[1])
        start, end = self.window[iteration].tolist()
        if start == 0:
            return torch.arange(end)
        return torch.cat([torch.arange(self.sink_frames), torch.arange(start + self.sink_frames, end)])


def ad_schedule(
    num_frames: int,
    num_inference_steps: int,
    ar_step: int,
    window: int | None = None,
    num_given: int = 0,
    sink_frames: int = 0,
    window_stride: int = 1,
) -> ADSchedule:
    """The AD schedule in closed form: after iteration n = 1, 2, ..., frame f has made ``clamp(n - f s, 0, S)`` steps.

    Eq. 5 in step indices. With ``window``, the model sees that many frames. The window moves by one when the next frame
    makes its first step; the frame that leaves must be clean by then. The ``sink_frames`` first frames of the video
    never leave it. They stand at the first positions of every window (attention sink: Xiao et al., 2024, Sec. 3.2).

    Args:
        num_frames: F. num_inference_steps: S. ar_step: s.
        window: Frames that the model sees at once, or None for all of them.
        num_given: Given first frames: clean from the start, never updated.
        sink_frames: First frames that stay when the window moves, at most ``window - 1``.
        window_stride: Frames by which the window moves at once, at most ``window - sink_frames``.

    Returns:
        The schedule; it has ``S + (F - num_given - 1) s`` iterations.

    Raises:
        ValueError: A size below 1, or an ``ar_step`` outside ``0..S`` or too small for the window. The message names
            the smallest valid ``ar_step``.
    """
    check_ar_step(num_frames, num_inference_steps, ar_step, window, sink_frames, window_stride)
    if not 0 <= num_given < num_frames:
        raise ValueError(f"{num_given} given frames leave nothing to generate of {num_frames}")
    iteration = torch.arange(num_inference_steps + (num_frames - num_given - 1) * ar_step + 1)  # (N+1,)
    lag = (torch.arange(num_frames) - num_given) * ar_step  # (F,)
    index = (iteration[:, None] - lag).clamp(0, num_inference_steps)  # (N+1, F)
    index[:, :num_given] = num_inference_steps
    spans = None
    if window is not None:
        started = (index[1:] > 0).sum(dim=1)  # (N,)
        start = torch.tensor([window_start(count, window, window_stride) for count in started.tolist()])
        spans = torch.stack([start, (start + window).clamp(max=num_frames)], dim=1)
    return ADSchedule(step_index=index[1:], update=index[1:] != index[:-1], window=spans, sink_frames=sink_frames)


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> Tensor:
    """The timestep of each sampling step: int64 ``(S,)``, strictly descending, within ``0..T-1``.

    They are evenly spaced and shifted up by one, and equal those of the authors' DDIM code wherever S > 1 divides T.
    (Otherwise the authors' code makes more than S steps, and leaves the range from S = T/2 + 1 on. Its single step of
    S = 1 takes pure noise for the nearly clean timestep 1; here it is made from T - 1.)

    Raises:
        ValueError: S is not in ``1..T``.
    """
    if not 1 <= num_inference_steps <= num_timesteps:
        raise ValueError(f"num_inference_steps must be in 1..{num_timesteps}, got {num_inference_steps}")
    if num_inference_steps == 1:
        return torch.tensor([num_timesteps - 1])
    steps = torch.arange(num_inference_steps) * num_timesteps // num_inference_steps
    return (steps + (1 if num_inference_steps < num_timesteps else 0)).flip(0)
