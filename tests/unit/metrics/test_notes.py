"""What a table says about the samples of its scores."""

from ardiff.metrics.distances import Frechet, Kernel, SetDistance
from ardiff.metrics.notes import bias_notes, rate_notes
from ardiff.metrics.uncertainty import Baseline, Resampling


def notes(distance: SetDistance, real: int, fake: int, width: int, clips: int = 0) -> list[str]:
    videos = [str(i % real) for i in range(clips or real)]
    resampling = Resampling(
        distance=distance, partitions=16, seed=0, real_videos=videos, fake_videos=[str(i) for i in range(fake)]
    )
    return bias_notes(distance, resampling, width, Baseline(142.0, real))


def test_few_videos_and_what_the_bias_is() -> None:
    [note] = notes(Frechet(), 256, 256, 400)
    assert note.startswith("256 videos are fewer than the 400 features.")
    assert "by about 142 for equal sets; the interval does not cover this bias" in note
    assert "N to infinity needs 1600 videos" in note
    assert notes(Frechet(), 1000, 2048, 400)[0].startswith("1000 videos are few for 400 features.")
    assert notes(Frechet(), 1600, 1600, 400) == []
    assert notes(Kernel(), 256, 256, 400) == []
    assert notes(Kernel(), 7, 256, 400) == ["There is no interval: it needs 8 videos."]


def test_real_videos_used_several_times() -> None:
    note, *others = notes(Frechet(), 100, 256, 400, clips=256)
    assert note.startswith("The 256 real clips are of 100 videos")
    assert others[0].startswith("100 videos are fewer")


def test_frame_rates() -> None:
    [note] = rate_notes([25.0, 30.0, 0.0], [8.0])
    assert note.startswith("Real clips have 25 to 30 frames a second, generated ones 8:")
    assert rate_notes([8.0], [8.001]) == rate_notes([0.0], [8.0]) == []
