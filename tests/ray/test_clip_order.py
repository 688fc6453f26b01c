"""The same clips in the same order for the same seed on 1, 2 and 3 workers and after a restart, as stored in golden/.

The list was made with ``python tests/ray/test_clip_order.py``; it is a promise to runs that have begun.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from ardiff import distributed
from ardiff.data.config import ClipConfig
from ardiff.data.encode import encode_video
from ardiff.data.manifest import VideoRecord, manifest_table
from ardiff.data.streams import ClipStream
from ardiff.resolution import Resolution
from ardiff.train.config import TrainConfig
from ray_jobs.training.batches import ray_batches

pytestmark = pytest.mark.ray
GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "clip_order.json"
LENGTHS = [9, 14, 8, 20, 11, 16, 10]
BATCH, STEPS, RESTART = 6, 7, 3
CLIPS = {
    "videos": ClipConfig(num_frames=3, stride=2, uniform="videos", horizontal_flip=True),
    "clips": ClipConfig(num_frames=3, stride=2, uniform="clips", clips_per_visit=2),
}


def write_videos(folder: Path) -> list[VideoRecord]:
    """Grey videos: frame ``f`` has brightness ``10 f`` and is darker on the left, so pixels show start and flip."""
    records = []
    for number, length in enumerate(LENGTHS):
        frames = np.zeros((length, 16, 16, 3), np.uint8)
        frames += 10 * np.arange(length, dtype=np.uint8)[:, None, None, None]
        frames[:, :, 8:] += 40
        data = encode_video(frames, 8, crf=1)
        (folder / f"{number}.mp4").write_bytes(data)
        place = str(folder / f"{number}.mp4")
        records.append(VideoRecord(place, len(data), "h264", 16, 16, 8.0, length, number, "x", "train", "ok", ""))
    return records


def seen(batch: dict[str, np.ndarray]) -> list[list[int]]:
    """Video, first frame and flip of every clip of a batch, from its pixels."""
    video = np.asarray(batch["video"]).astype(float)
    left, right = video[:, 0, :, :6].mean(axis=(1, 2, 3)), video[:, 0, :, 10:].mean(axis=(1, 2, 3))
    start = np.round(np.minimum(left, right) / 10).astype(int)
    return [
        list(row)
        for row in zip(batch["label"].tolist(), start.tolist(), (left > right).astype(int).tolist(), strict=True)
    ]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[VideoRecord]:
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("uniform", ["videos", pytest.param("clips", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("num_workers", "first_step"),
    [(3, 0), (1, RESTART), *(pytest.param(n, 0, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_the_clip_list_is_the_stored_one(
    records: list[VideoRecord],
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    uniform: str,
    num_workers: int,
    first_step: int,
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: num_workers)
    stream = ClipStream(manifest_table(records), CLIPS[uniform], Resolution.square(16), seed=5, chunk_size=4)
    config = TrainConfig(num_steps=STEPS, batch_size=BATCH, num_workers=num_workers, loading_tasks=1)
    shares = []
    for rank in range(num_workers):
        batches = ray_batches(stream, first_step * BATCH, config, rank, None)
        shares.append([seen({k: v.numpy() for k, v in batch.items()}) for batch in batches])
    merged = [row for step in zip(*shares, strict=True) for share in step for row in share]
    assert merged == json.loads(GOLDEN.read_text())[uniform][first_step * BATCH :]


@pytest.mark.parametrize("uniform", CLIPS)
def test_an_epoch_is_whole(uniform: str) -> None:
    """Every video once an epoch, or every part of every video that holds a clip."""
    rows, each = json.loads(GOLDEN.read_text())[uniform], CLIPS[uniform].clips_per_visit
    assert len(rows) == STEPS * BATCH
    if uniform == "videos":
        assert sorted(video for video, _, _ in rows[: len(LENGTHS)]) == list(range(len(LENGTHS)))
        assert {flip for _, _, flip in rows} == {0, 1}
    else:
        visits = [length // CLIPS[uniform].span for length in LENGTHS]
        epoch = [video for video, _, _ in rows[: sum(visits) * each]]
        # Chunks of four clips are shuffled, so the last ones of an epoch may trade places with the next one's first.
        assert sum(epoch.count(v) != each * n for v, n in enumerate(visits)) <= 2
    assert all(0 <= start <= LENGTHS[video] - 5 for video, start, _ in rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = {}
        for name, settings in CLIPS.items():
            whole = ClipStream(
                manifest_table(write_videos(Path(place))), settings, Resolution.square(16), seed=5, chunk_size=4
            )
            loaded = [row for chunk in range(-(-STEPS * BATCH // 4)) for row in seen(whole.load(chunk))]
            made[name] = loaded[: STEPS * BATCH]
    sys.stdout.write(json.dumps(made) + "\n")
