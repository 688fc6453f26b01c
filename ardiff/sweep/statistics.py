"""Measures of single videos: statistics over time, and two scores derived from them, drift and deviation.

Shapes: F frames, H W pixels, S segments.
"""

from collections.abc import Sequence

import numpy as np

from ardiff.metrics.drift import SEGMENT, STATISTICS, clip_statistics

Statistics = dict[str, list[float]]
"""By name of ``STATISTICS``, the values of the segments of a video, ``(S,)``."""


def segment_length(num_frames: int) -> int:
    """Frames of a segment: 16, or half of a video that is too short for two such segments."""
    return SEGMENT if num_frames >= 2 * SEGMENT else max(num_frames // 2, 2)


def video_statistics(frames: np.ndarray) -> Statistics:
    """The ``STATISTICS`` of each whole segment of a video, uint8 ``(F, H, W, 3)``; empty for a single frame."""
    length = segment_length(len(frames))
    starts = range(0, len(frames) - length + 1, length)
    values = [clip_statistics(frames[start : start + length]).tolist() for start in starts]
    return {name: [v[i] for v in values] for i, name in enumerate(STATISTICS)} if values else {}


def drift(statistics: Statistics) -> float:
    """The largest relative change of any statistic between the first segment and a later one.

    ``max |later - first| / max(first, 1)``, in grey levels; 0 for a video of one segment, NaN without statistics.
    """
    if not statistics:
        return float("nan")
    changes = [np.abs(np.array(v) - v[0]).max() / max(v[0], 1.0) for v in statistics.values()]
    return float(max(changes))


def deviation(statistics: Statistics, real: Sequence[Statistics]) -> float:
    """The distance of a video from the mean of real clips, in standard deviations of the real clips.

    Root mean square over the segments of the video, for the statistic where it is largest. NaN without statistics.

    Args:
        statistics: Of the video.
        real: Of at least two real clips; their segments are as long as those of the video.

    Raises:
        ValueError: There are fewer than two real clips.
    """
    if len(real) < 2:
        raise ValueError(f"deviations need at least two real clips, got {len(real)}")
    if not statistics:
        return float("nan")
    distances = []
    for name, values in statistics.items():
        means = np.array([np.mean(clip[name]) for clip in real])
        spread = max(float(means.std(ddof=1)), 0.5)  # grey levels: smaller changes may come from the codec
        distances.append(np.sqrt((((np.array(values) - means.mean()) / spread) ** 2).mean()))
    return float(max(distances))
