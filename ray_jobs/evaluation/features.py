"""Decodes clips and extracts their features on actors, on Ray Data; what was done before is not done again."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.data
import torch

from ardiff.data.clips import read_clip
from ardiff.data.manifest import VideoRecord
from ardiff.errors import DataError
from ardiff.metrics.store import ClipFeatures, FeatureStore, StoredClip
from ardiff.metrics.uncertainty import Videos
from ray_jobs.runtime.progress import remote_progress, report_errors

PART = 64
"""Clips that are kept at once; what an interruption loses."""
Measure = Callable[[np.ndarray], np.ndarray]
"""uint8 clips ``(n, F, H, W, 3)``, or pairs of them ``(n, 2, F, H, W, 3)``, to float32 ``(n, k, D)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What the extraction runs on."""

    device: torch.device
    batch_size: int
    """Clips that a task holds; on a GPU they go through the network together."""
    max_actors: int
    """Actors are started as they have work, up to this many."""
    cpus: float
    """CPUs that an actor reserves, and threads that it uses."""
    gpus: float
    """GPUs that an actor reserves, where there are any."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Where the frames of a clip are."""

    video: VideoRecord
    start: int
    stride: int
    original: VideoRecord | None = None
    """Video that this one is compared with, frame by frame."""
    fps: float = 0.0
    """Frame rate at which start and stride count; 0 for the video's own."""


@dataclass(frozen=True, slots=True)
class ClipSet:
    """Clips, and where what is extracted from them is kept."""

    clips: list[Clip]
    store: FeatureStore


Extracted = tuple[Videos, list[StoredClip]]
"""Features of a set's clips in their order, float32 ``(k, D)`` each, and the clips; :meth:`FeatureStore.read`."""


def extract(
    what: str,
    sets: list[ClipSet],
    build: Callable[[torch.device], Measure],
    num_frames: int,
    resolution: int | None,
    workers: Workers,
) -> list[Extracted]:
    """Features of all sets, by one pool of actors.

    Clips are cut into batches by their place alone, so neither the number of actors nor a repetition changes them. An
    actor that dies is replaced and its batch done again; the stores keep one row per clip.

    Args:
        what: For the progress bar.
        sets: The sets; clips that are in a store already are left alone.
        build: Makes what measures the clips, on the actors.
        num_frames: Frames of a clip.
        resolution: Height and width that frames are scaled and cropped to; None leaves them as they are.
        workers: What to run on.

    Raises:
        DataError: A video cannot be read or decoded, has another size than its neighbours, or gives no finite features.
    """
    size, total, left, batches = workers.batch_size, sum(len(s.clips) for s in sets), 0, []
    for number, clip_set in enumerate(sets):
        done = clip_set.store.ids()
        for first in range(0, len(clip_set.clips), size):
            clips = clip_set.clips[first : first + size]
            if not done.issuperset(range(first, first + len(clips))):
                batches.append({"set": number, "first": first, "clips": [asdict(clip) for clip in clips]})
                left += len(clips)
    if batches:
        with remote_progress(what, total, "clip") as progress:
            progress.add.remote(total - left)
            _run(batches, [s.store for s in sets], build, num_frames, resolution, workers, progress)
    return [s.store.read(len(s.clips)) for s in sets]


def _run(
    batches: list[dict[str, Any]],
    stores: list[FeatureStore],
    build: Callable[[torch.device], Measure],
    num_frames: int,
    resolution: int | None,
    workers: Workers,
    progress: Any,
) -> None:
    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        with report_errors(progress):
            return _decode(batch, num_frames, resolution)

    rows = (
        ray.data.from_items(batches, override_num_blocks=len(batches))
        .map(decode, num_cpus=0.5)
        .flat_map(
            _Actor,
            fn_constructor_args=(build, workers, progress),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.max_actors),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus if workers.device.type == "cuda" else 0,
            # A batch that kills its actor is tried again a few times, not for ever.
            ray_remote_args_fn=lambda: {"max_task_retries": 3},
        )
        .iter_rows()
    )
    waiting: dict[int, list[ClipFeatures]] = {number: [] for number in range(len(stores))}
    for row in rows:
        features = np.asarray(row["features"], dtype=np.float32)
        mine = waiting[row["set"]]
        mine.append(ClipFeatures(row["id"], row["uri"], row["start"], row["sha256"], features))
        if len(mine) >= PART:
            stores[row["set"]].append(mine)
            waiting[row["set"]] = []
    for number, mine in waiting.items():
        if mine:
            stores[number].append(mine)


def _decode(batch: dict[str, Any], num_frames: int, resolution: int | None) -> dict[str, Any]:
    """Adds the frames, uint8 ``(n, F, H, W, 3)`` or ``(n, 2, F, H, W, 3)``, and hashes of what is seen."""
    videos, hashes = [], []
    for clip in batch["clips"]:
        records = [VideoRecord(**side) for side in (clip["original"], clip["video"]) if side is not None]
        start, stride, fps = int(clip["start"]), int(clip["stride"]), float(clip["fps"])
        sides = [read_clip(r, start, num_frames, stride, resolution, fps) for r in records]
        hashes.append(":".join(hashlib.sha256(side.tobytes()).hexdigest() for side in sides))
        videos.append(sides[0] if len(sides) == 1 else _stack(sides, " and ".join(r.uri for r in records)))
    return {**batch, "sha256": hashes, "videos": _stack(videos, "The videos of a batch")}


def _stack(videos: list[np.ndarray], names: str) -> np.ndarray:
    if len({video.shape for video in videos}) > 1:
        sizes = " and ".join(sorted({f"{v.shape[-2]}x{v.shape[-3]}" for v in videos}))
        raise DataError(f"{names} have different sizes ({sizes}): give --resolution to bring them to one.")
    return np.stack(videos)


class _Actor:
    """Holds a network and measures batch after batch."""

    def __init__(self, build: Callable[[torch.device], Measure], workers: Workers, progress: Any) -> None:
        torch.set_num_threads(max(1, int(workers.cpus)))
        self.progress, self.measure = progress, build(workers.device)

    def __call__(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        with report_errors(self.progress):
            features = self.measure(np.asarray(batch["videos"]))  # (n, k, D)
        self.progress.add.remote(len(features))
        return [
            {
                "set": int(batch["set"]),
                "id": int(batch["first"]) + i,
                "uri": clip["video"]["uri"],
                "start": int(clip["start"]),
                "sha256": batch["sha256"][i],
                "features": features[i],
            }
            for i, clip in enumerate(batch["clips"])
        ]
