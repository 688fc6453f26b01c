"""The valid values of ``ar_step``, the timestep difference of the AD scheduler (Sec. 3.4), and the window that they
depend on. Does not import torch."""


def check_ar_step(
    num_frames: int,
    num_inference_steps: int,
    ar_step: int,
    window: int | None = None,
    sink_frames: int = 0,
    window_stride: int = 1,
) -> None:
    """Raises ValueError unless every frame finishes with these sizes."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 frame, got {window}")
    if window is not None and not 0 <= sink_frames < window:
        raise ValueError(f"sink_frames must be between 0 and {window - 1} in a window of {window}, got {sink_frames}")
    if window is not None and not 1 <= window_stride <= window - sink_frames:
        raise ValueError(f"window_stride must be between 1 and {window - sink_frames}, got {window_stride}")
    smallest = smallest_ar_step(num_frames, num_inference_steps, window, sink_frames, window_stride)
    if not smallest <= ar_step <= num_inference_steps:
        reason = ""
        if smallest:
            reason = f", because a frame must be clean before it leaves the window of {window} frames"
            reason += f", {sink_frames} of which are the first ones of the video" if sink_frames else ""
            reason += f", which moves by {window_stride}" if window_stride > 1 else ""
        raise ValueError(
            f"ar_step must be between {smallest} and num_inference_steps ({num_inference_steps}) "
            f"for {num_frames} frames{reason}; got {ar_step}. The smallest valid ar_step is {smallest}."
        )


def smallest_ar_step(
    num_frames: int, num_inference_steps: int, window: int | None = None, sink_frames: int = 0, window_stride: int = 1
) -> int:
    """The smallest ``ar_step`` with which every frame finishes: 0 if all fit in the window, else ``ceil(S / n)``.

    The first frame to leave early does so when the n-th frame after it starts: ``n = window - sink_frames -
    window_stride + 1``.
    """
    if window is None or num_frames <= window:
        return 0
    return -(-num_inference_steps // (window - sink_frames - window_stride + 1))


def window_start(num_started: int, window: int, window_stride: int = 1) -> int:
    """The first frame of the window when ``num_started`` frames have started: a multiple of the stride.

    The sink takes the places of the first frames from here on.
    """
    return max(0, -(-(num_started - window) // window_stride) * window_stride)
