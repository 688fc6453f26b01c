"""Notes below a table of scores: what its reader should know about the samples, a sentence each."""

from collections.abc import Sequence

from ardiff.metrics.distances import SetDistance
from ardiff.metrics.uncertainty import MIN_VIDEOS, Baseline, Resampling, videos_to_extrapolate


def bias_notes(distance: SetDistance, resampling: Resampling, width: int, baseline: Baseline) -> list[str]:
    """Notes about the number of clips and videos of a distance between features of ``width``."""
    notes = []
    for side, videos in (("real", resampling.real_videos), ("generated", resampling.fake_videos)):
        if (count := len(set(videos))) < len(videos):
            notes.append(
                f"The {len(videos)} {side} clips are of {count} videos: clips of one video are not independent, so "
                f"they count as {count} to {len(videos)}."
            )
    num_videos = resampling.num_videos
    if resampling.partitions and num_videos < MIN_VIDEOS:
        notes.append(f"There is no interval: it needs {MIN_VIDEOS} videos.")
    if distance.biased and num_videos < (needed := videos_to_extrapolate(width)):
        share = "" if baseline.distance is None else f", here by about {baseline.distance:.4g} for equal sets"
        few = f"{num_videos} videos are {'fewer than the' if num_videos < width else 'few for'} {width} features. "
        notes.append(
            f"{few}The number of videos alone makes the score too large{share}; the interval does not cover this bias. "
            f"N to infinity needs {needed} videos a set."
        )
    return notes


def rate_notes(real: Sequence[float], generated: Sequence[float]) -> list[str]:
    """A note if clips are sampled at different frame rates. Rates of 0 are unknown."""
    rates = [sorted({round(rate, 2) for rate in side if rate > 0}) for side in (real, generated)]
    if not all(rates) or rates[0] == rates[1]:
        return []
    shown = [f"{side[0]:g}" if len(side) == 1 else f"{side[0]:g} to {side[-1]:g}" for side in rates]
    return [
        f"Real clips have {shown[0]} frames a second, generated ones {shown[1]}: the speed of motion differs. --fps "
        "samples real videos at one rate."
    ]
