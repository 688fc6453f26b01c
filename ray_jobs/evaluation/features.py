"""Decodes clips and extracts their features with Ray Data actors. Stored features are not extracted again."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.data
import torch

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.store import ClipFeatures, FeatureStore, StoredClip
from ardiff.resolution import Resolution
from ray_jobs.evaluation.config import EvaluateConfig, ScoredClips
from ray_jobs.evaluation.datasets import Clip
from ray_jobs.evaluation.frames import read_frames
from ray_jobs.evaluation.reconstruction import Reconstructor
from ray_jobs.runtime.cluster import resolve_device
from ray_jobs.runtime.progress import remote_progress, report_errors

CLIPS_PER_FILE = 64
"""Clips that are stored at once. An interruption loses up to this many."""
Measure = Callable[[np.ndarray], np.ndarray]
"""uint8 clips ``(n, F, H, W, 3)``, or pairs of them ``(n, 2, F, H, W, 3)``, to float32 ``(n, k, D)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The actors of an extraction."""

    device: torch.device
    batch_size: int
    """Clips per task. On a GPU they pass the network together."""
    max_actors: int
    """Most actors; Ray Data starts them as there is work."""
    cpus: float
    """CPUs that an actor reserves. On CPUs it measures as many clips at once, each in one thread, so that the result
    does not depend on their number."""
    gpus: float
    """GPUs that an actor reserves if there are any."""

    @classmethod
    def of(cls, config: EvaluateConfig) -> "Workers":
        """The actors that the configuration asks for."""
        return cls(
            device=resolve_device(config.device),
            batch_size=config.batch_size,
            max_actors=config.max_actors,
            cpus=config.cpus_per_actor,
            gpus=config.gpus_per_actor,
        )

    @classmethod
    def on_cpus(cls, config: ScoredClips) -> "Workers":
        """Actors of one CPU each, for measurements without a network."""
        device, size = torch.device("cpu"), config.batch_size
        return cls(device=device, batch_size=size, max_actors=config.max_actors, cpus=1.0, gpus=0.0)


@dataclass(frozen=True, slots=True)
class ClipSet:
    """Clips and the store of their features."""

    clips: list[Clip]
    store: FeatureStore
    vae: str = ""
    """An AR-VAE folder: its reconstructions of the clips are measured."""
    against_original: bool = False
    """Measure pairs of a clip and its reconstruction."""


Extracted = tuple[VideoFeatures, list[StoredClip]]
"""Features of a set's clips in their order, float32 ``(k, D)`` each, and the clips, see :meth:`FeatureStore.read`."""


def read_stored(sets: list[ClipSet]) -> list[Extracted] | None:
    """The features of all sets, without a cluster; None if any clip has none yet. Raises DataError."""
    if all(s.store.ids().issuperset(range(len(s.clips))) for s in sets):
        return [s.store.read(len(s.clips)) for s in sets]
    return None


def extract(
    label: str,
    sets: list[ClipSet],
    build: Callable[[torch.device], Measure],
    num_frames: int,
    resolution: Resolution | None,
    workers: Workers,
) -> list[Extracted]:
    """Extracts the features of all sets with one pool of actors.

    Batches depend only on the order of the clips, so the number of actors and repetitions do not change them. Ray
    replaces an actor that crashes and repeats its batch; a store keeps one row per clip.

    Args:
        label: Name of the progress bar.
        sets: The sets. Clips that are in their store are skipped.
        build: Makes the function that measures the clips, on the actors.
        num_frames: Frames of a clip.
        resolution: Scale and crop frames to this shape; None keeps their size.
        workers: The actors.

    Raises:
        DataError: A video cannot be read or decoded, has another size than the others of its batch, or gives features
            that are not finite.
    """
    size, total, num_missing, batches = workers.batch_size, sum(len(s.clips) for s in sets), 0, []
    for number, clip_set in enumerate(sets):
        done = clip_set.store.ids()
        for first in range(0, len(clip_set.clips), size):
            clips = clip_set.clips[first : first + size]
            if not done.issuperset(range(first, first + len(clips))):
                batch = {"set": number, "first": first, "clips": [asdict(clip) for clip in clips]}
                batches.append({**batch, "vae": clip_set.vae, "against_original": clip_set.against_original})
                num_missing += len(clips)
    if batches:
        with remote_progress(label, total, "clip") as progress:
            progress.add.remote(total - num_missing)
            _run(batches, [s.store for s in sets], build, num_frames, resolution, workers, progress)
    return [s.store.read(len(s.clips)) for s in sets]


def _run(
    batches: list[dict[str, Any]],
    stores: list[FeatureStore],
    build: Callable[[torch.device], Measure],
    num_frames: int,
    resolution: Resolution | None,
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
            # A batch that crashes its actor is repeated a few times only.
            ray_remote_args_fn=lambda: {"max_task_retries": 3},
        )
        .iter_rows()
    )
    buffers: dict[int, list[ClipFeatures]] = {number: [] for number in range(len(stores))}
    for row in rows:
        features = np.asarray(row["features"], dtype=np.float32)
        buffer = buffers[row["set"]]
        buffer.append(ClipFeatures(row["id"], row["uri"], row["start"], row["sha256"], features))
        if len(buffer) >= CLIPS_PER_FILE:
            stores[row["set"]].append(buffer)
            buffers[row["set"]] = []
    for number, buffer in buffers.items():
        if buffer:
            stores[number].append(buffer)


def _decode(batch: dict[str, Any], num_frames: int, resolution: Resolution | None) -> dict[str, Any]:
    """Adds the frames, uint8 ``(n, F, H, W, 3)`` or ``(n, 2, F, H, W, 3)``, and a hash of each clip's pixels."""
    videos, hashes = [], []
    for clip in batch["clips"]:
        names = ["original", "video"] if clip["original"] is not None else ["video"]
        sides = [read_frames(clip, name, num_frames, resolution) for name in names]
        hashes.append(":".join(map(_sha256, sides)))
        videos.append(sides[0] if len(sides) == 1 else _stack(sides, " and ".join(clip[name]["uri"] for name in names)))
    return {**batch, "sha256": hashes, "videos": _stack(videos, "The videos of a batch")}


def _sha256(video: np.ndarray) -> str:
    return hashlib.sha256(video.tobytes()).hexdigest()


def _stack(videos: list[np.ndarray], names: str) -> np.ndarray:
    if len({video.shape for video in videos}) > 1:
        sizes = " and ".join(sorted({str(Resolution(*v.shape[-3:-1])) for v in videos}))
        raise DataError(
            f"{names} have different sizes ({sizes}, height x width): give --resolution to scale and crop them to one."
        )
    return np.stack(videos)


class _Actor:
    """A Ray actor that measures batches."""

    def __init__(self, build: Callable[[torch.device], Measure], workers: Workers, progress: Any) -> None:
        torch.set_num_threads(1)
        self.progress, self.measure = progress, build(workers.device)
        self.reconstruct = Reconstructor(workers.device)
        self.threads = None
        if workers.device.type == "cpu" and workers.cpus >= 2:
            self.threads = ThreadPoolExecutor(int(workers.cpus), initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        hashes = list(batch["sha256"])
        with report_errors(self.progress):
            videos = np.asarray(batch["videos"])
            if batch["vae"]:
                originals, videos = videos, self.reconstruct(str(batch["vae"]), videos)
                hashes = [f"{own}:{_sha256(video)}" for own, video in zip(hashes, videos, strict=True)]
                videos = np.stack([originals, videos], axis=1) if batch["against_original"] else videos
            features = self._measure(videos)  # (n, k, D)
        self.progress.add.remote(len(features))
        return [
            {
                "set": int(batch["set"]),
                "id": int(batch["first"]) + i,
                "uri": clip["video"]["uri"],
                "start": int(clip["start"]),
                "sha256": hashes[i],
                "features": features[i],
            }
            for i, clip in enumerate(batch["clips"])
        ]

    def _measure(self, videos: np.ndarray) -> np.ndarray:
        if self.threads is None:
            return self.measure(videos)
        return np.concatenate(list(self.threads.map(self.measure, np.split(videos, len(videos)))))


def data_keys(clips: list[Clip]) -> list[list[Any]]:
    """Identifies the data of clips without reading it: start, stride, frame rate, and URI, size and version of videos.

    Sizes and versions come from the records; for records without an etag, the files' sizes and times count.

    Raises:
        DataError: A file is gone.
    """
    videos = {side.uri: side for clip in clips for side in (clip.video, clip.original) if side is not None}
    versions: dict[str, list[Any]] = {uri: [video.size, video.version] for uri, video in videos.items()}
    unversioned = sorted(uri for uri, video in videos.items() if not video.etag)
    for remote in (True, False):
        uris = [uri for uri in unversioned if storage.is_remote(uri) == remote]
        if uris:
            filesystem, _ = storage.open_filesystem(uris[0])
            paths = [uri.partition("://")[2] if remote else uri for uri in uris]
            for uri, info in zip(uris, filesystem.get_file_info(paths), strict=True):
                if not info.is_file:
                    raise DataError(f"There is no video {uri} any more: list the videos again.")
                versions[uri] = [info.size, info.mtime_ns or 0, *filter(None, [videos[uri].filters])]

    def key(clip: Clip) -> list[Any]:
        sides = [None if side is None else [side.uri, *versions[side.uri]] for side in (clip.video, clip.original)]
        return [clip.start, clip.stride, clip.fps, clip.fit, *sides]

    return [key(clip) for clip in clips]
