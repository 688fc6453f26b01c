"""Cost of a video before it is sampled: evaluations of frames, and sequential passes of the model, with the frames that
have started and those that are final after each.

All take parameters that :func:`ardiff.sampling.params.validate` has returned.
"""

from ardiff.diffusion.ar_step import window_start
from ardiff.sampling.params import SamplingParams


def sequential_passes(params: SamplingParams) -> int:
    """Passes of the model that must follow each other: ``S + (F - 1) ar_step`` for F frames that are not given.

    The engine adds one to store the sink, if the given frames fill the window.
    """
    generated = params.num_frames - params.given_frames
    return params.resolved_num_inference_steps + (generated - 1) * params.resolved_ar_step


def started_frames(params: SamplingParams, iteration: int) -> int:
    """The first frames of a video that have made a step after ``iteration``, or were given."""
    given, frames, ar_step = params.given_frames, params.num_frames, params.resolved_ar_step
    if iteration < 1:
        return given
    return min(frames, given + (iteration - 1) // ar_step + 1) if ar_step else frames


def final_frames(params: SamplingParams, iteration: int) -> int:
    """The first frames of a video that are clean after ``iteration``."""
    return started_frames(params, iteration - params.resolved_num_inference_steps + 1)


def frame_evaluations(params: SamplingParams, window: int) -> int:
    """Evaluations of a frame by the model for one video; guidance doubles them.

    Without guidance and given frames: ``F S + F - 1`` in mode ``rolling``, and in mode ``window`` up to ``window``
    frames. In longer videos, the clean frames are evaluated again whenever the window moves, which is once in
    ``window_stride`` frames, except those of the sink (see :mod:`ardiff.sampling.engine`). Mode ``full`` evaluates
    every visible frame in every pass.

    Args:
        window: Frames that the model sees at once.
    """
    branches = 2 if params.guided else 1
    frames, passes = params.num_frames, sequential_passes(params)
    moving_window = params.mode == "window" and frames > window
    if params.mode == "full":
        starts = (window_start(started_frames(params, n), window, params.window_stride) for n in range(1, passes + 1))
        return branches * sum(min(window, frames - start) for start in starts)
    sink = params.sink_frames if moving_window else 0
    total, stored, base = 0, 0, 0
    if started_frames(params, 1) > window:  # many frames are given: the sink needs a pass of its own
        total = sink
    for iteration in range(1, passes + 1):
        end = started_frames(params, iteration)
        start = window_start(end, window, params.window_stride) if moving_window else 0
        if start > base:
            base, stored = start, start + sink
        total += end - stored
        stored = max(base + sink if base else 0, final_frames(params, iteration - 1))
    return branches * total
