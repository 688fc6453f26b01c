"""Numbers of single videos: simple statistics along the way, and how unsteady or unlike real clips these make a video.

Shapes: F frames, H W pixels, P parts.
"""

from collections.abc import Sequence

import numpy as np

from ardiff.metrics.drift import SEGMENT, STATISTICS, clip_statistics

Statistics = dict[str, list[float]]
"""Each of the ``STATISTICS`` of each part of a video, ``(P,)``."""


def part_length(num_frames: int) -> int:
    """Frames of a part: 16, or half of a video that is too short for two of them."""
    return SEGMENT if num_frames >= 2 * SEGMENT else max(num_frames // 2, 2)


def video_statistics(frames: np.ndarray) -> Statistics:
    """The ``STATISTICS`` of each whole part of a video, uint8 ``(F, H, W, 3)``; none of a video of one frame."""
    length = part_length(len(frames))
    starts = range(0, len(frames) - length + 1, length)
    values = [clip_statistics(frames[start : start + length]).tolist() for start in starts]
    return {name: [v[i] for v in values] for i, name in enumerate(STATISTICS)} if values else {}


def drift(statistics: Statistics) -> float:
    """How unsteady a video is: the largest relative change of any statistic between its first part and a later one.

    ``max |later - first| / max(first, 1)``, in grey levels; 0 for a video of one part, NaN without statistics.
    """
    if not statistics:
        return float("nan")
    changes = [np.abs(np.array(v) - v[0]).max() / max(v[0], 1.0) for v in statistics.values()]
    return float(max(changes))


def deviation(statistics: Statistics, real: Sequence[Statistics]) -> float:
    """How unlike real clips a video is: its distance from the mean of real clips in units of their standard deviation,
    root mean square over its parts, of that statistic for which it is largest.

    Args:
        statistics: Of the video.
        real: Of two or more real clips; a part of each has as many frames as one of the video.

    Raises:
        ValueError: There are fewer than two real clips.
    """
    if len(real) < 2:
        raise ValueError(f"deviations need at least two real clips, got {len(real)}")
    if not statistics:
        return float("nan")
    distances = []
    for name, values in statistics.items():
        level = np.array([np.mean(clip[name]) for clip in real])
        spread = max(float(level.std(ddof=1)), 0.5)  # grey levels: what a codec changes is no deviation
        distances.append(np.sqrt((((np.array(values) - level.mean()) / spread) ** 2).mean()))
    return float(max(distances))
