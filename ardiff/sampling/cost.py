"""What a video costs before it is made: evaluations of frames, and passes of the model one after the other."""

from ardiff.diffusion.ar_step import smallest_ar_step


def sequential_passes(num_frames: int, num_inference_steps: int, ar_step: int) -> int:
    """Iterations ``S + (F - 1) s`` that must follow each other, whatever the executor."""
    return num_inference_steps + (num_frames - 1) * ar_step


def frame_evaluations(
    num_frames: int, num_inference_steps: int, ar_step: int, window: int, executor: str = "window"
) -> int:
    """Evaluations of a frame that a video without given frames takes, in one branch of guidance.

    ``F S + F - 1`` for ``rolling``, and for ``window`` within the model's length; when a window moves, the clean frames
    in it are evaluated again (see :mod:`ardiff.sampling.engine`). ``full`` evaluates every visible frame.

    Args:
        num_frames: F. num_inference_steps: S. ar_step: s, valid for these (see ``check_ar_step``).
        window: Frames that the model sees at once.
        executor: ``window``, ``rolling`` or ``full``.
    """
    passes = sequential_passes(num_frames, num_inference_steps, ar_step)
    if executor == "full":
        return passes * min(num_frames, window)
    moving_window = executor == "window" and num_frames > window
    assert ar_step >= smallest_ar_step(num_frames, num_inference_steps, window if moving_window else None)

    def started(iteration: int) -> int:
        if iteration < 1:
            return 0
        return min(num_frames, (iteration - 1) // ar_step + 1) if ar_step else num_frames

    total, stored, base = 0, 0, 0
    for iteration in range(1, passes + 1):
        end = started(iteration)
        if moving_window and end - window > base:
            base = stored = end - window
        total += end - stored
        stored = max(base, started(iteration - num_inference_steps))
    return total
