"""The quickstart's scores: sets of generated videos against held-out real clips, with controls beside them.

The distance is on features of a seeded random network: it ranks sets of this data among each other and is not
comparable with published FVD numbers. What makes it readable are the controls: the same number of real clips, and real
clips that were damaged on purpose. If the weights of I3D are in the cache, FVD is computed beside it, on fewer clips.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import ray
import ray.data
import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.clips import read_clip
from ardiff.data.manifest import VideoRecord
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.errors import ConfigError
from ardiff.metrics import stats
from ardiff.metrics.extractors import Extractor
from ardiff.metrics.features import RandomVideoFeatures, scale_features
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.networks.i3d import MIN_FRAMES
from ardiff.metrics.protocol import Protocol, recipe
from ardiff.metrics.weights import State, cached, find_state
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import numpy_generator
from ray_jobs.common import ray_cluster, record_run, remote_progress, say, stage, telling
from ray_jobs.extraction import Clip
from ray_jobs.scored_sets import Listed, fake_clips, locate, open_videos, real_clips

if TYPE_CHECKING:
    from ray_jobs.evaluate import EvaluateConfig

FVD = recipe("styleganv", "fvd")
REFERENCE, REAL, RECONSTRUCTION = "reference", "real", "reconstruction"


def run(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Writes and returns the scores: ``{"protocol": ..., "sets": {name: {"distance": ..., ...}}}``.

    Raises:
        ArdiffError: There are no held-out real clips, or a set has fewer videos than clips are asked for.
    """
    state, places = _i3d(config), [locate(uri) for uri in (config.real, *config.fake)]
    # Before anything starts, where it can be; the videos of a folder are looked at on Ray.
    listed = _sets(config, places) if all(place.records is not None for place in places) else None
    with ray_cluster(), stage("evaluate", config.output, key) as record:
        record_run(config.output, config)
        sets = listed or _sets(config, places)
        frame = _measure(config, sets, state)
        scores = _reduce(config, frame)
        storage.write_bytes(storage.join(config.output, "features.parquet"), _parquet(frame))
        storage.write_bytes(storage.join(config.output, "scores.json"), json.dumps(scores, indent=1).encode())
        record.results = scores
        _print(scores)
    return scores


def _sets(config: EvaluateConfig, places: list[Listed]) -> dict[str, list[Clip]]:
    """The clips of every set: the reference, as many real clips again, whole and damaged, and the generated ones."""
    real, *fakes = places
    count = config.num_clips
    records = open_videos(real, config.split, config.span, config.fps)
    clips = real_clips(records, 2 * count, config.span, config.stride, config.seed, config.fps)
    derived = [REAL, *([RECONSTRUCTION] if config.vae else []), *(stats.CONTROLS if config.controls else ())]
    sets = {REFERENCE: clips[:count], **dict.fromkeys(derived, clips[count:])}
    for fake in fakes:
        if (name := fake.name) in sets:
            raise ConfigError(f"Two sets are called '{name}': keep generated videos in folders of different names.")
        sets[name] = fake_clips(fake, open_videos(fake, "test", config.num_frames), count, config.num_frames)
    return sets


def _i3d(config: EvaluateConfig) -> State | None:
    """The weights of I3D, if they are in the cache and FVD can be computed."""
    return find_state("i3d")[0] if _has_i3d(config) else None


def _has_i3d(config: EvaluateConfig) -> bool:
    return config.i3d_clips > 0 and config.num_frames >= MIN_FRAMES and cached("i3d").exists()


def lacks_fvd(config: EvaluateConfig, scores: dict[str, Any]) -> bool:
    """Whether the scores have no FVD, and would have it now: the weights were fetched since."""
    return "fvd" not in scores["extractors"] and _has_i3d(config)


def _measure(config: EvaluateConfig, sets: dict[str, list[Clip]], state: State | None) -> pd.DataFrame:
    """One row per clip: set, index, features and what else is measured of it."""
    size = config.batch_size
    tasks = [
        {"set": name, "first": first, "clips": [asdict(clip) for clip in clips[first : first + size]]}
        for name, clips in sets.items()
        for first in range(0, len(clips), size)
    ]
    total = sum(len(clips) for clips in sets.values())
    with remote_progress("scoring", total, "clip") as monitor:
        rows = (
            ray.data.from_items(tasks, override_num_blocks=len(tasks))
            .flat_map(
                _Scorer,
                fn_constructor_args=(config, None if state is None else ray.put(state), monitor),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
                num_cpus=1,
            )
            .take_all()
        )
    # Sorted by name and index, so that the order in which tasks ended leaves no trace.
    return pd.DataFrame(rows).sort_values(["set", "index"], ignore_index=True)


class _Scorer:
    """An actor that decodes clips, damages or reconstructs them if their set asks for it, and measures them."""

    def __init__(self, config: EvaluateConfig, state: Any, monitor: Any) -> None:
        torch.set_num_threads(1)
        self.config, self.monitor = config, monitor
        self.features = RandomVideoFeatures(config.extractor_seed)
        self.vae = load_autoencoder(config.vae) if config.vae else None
        self.i3d = None if state is None else Extractor(FVD, ray.get(state), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        config, name = self.config, task["set"]
        with telling(self.monitor):
            clips = [self._decode(clip) for clip in task["clips"]]
        original = np.stack(clips)  # (n, F, H, W, 3)
        videos = self._prepare(name, original, int(task["first"]))
        features = self.features(torch.from_numpy(videos)).numpy()  # (n, D)
        rows = []
        for i, clip in enumerate(task["clips"]):
            uri, index = clip["video"]["uri"], int(task["first"]) + i
            row = {"set": name, "index": index, "uri": uri, "features": features[i].tolist()}
            if self.i3d is not None and name not in stats.CONTROLS and row["index"] < config.i3d_clips:
                row["i3d"] = self.i3d(videos[i : i + 1])[0, 0].tolist()
            if name == RECONSTRUCTION:
                row["psnr"] = stats.psnr(original[i], videos[i])
            if config.shapes and name not in stats.CONTROLS:
                row["motion"] = all(stats.motion_checks(stats.track(videos[i])).values())
                row["recognised"] = stats.recognise(videos[i]) == clip["video"]["label"]
            rows.append(row)
        self.monitor.add.remote(len(rows))
        return rows

    def _decode(self, clip: dict[str, Any]) -> np.ndarray:
        start, stride, fps, config = int(clip["start"]), int(clip["stride"]), float(clip["fps"]), self.config
        return read_clip(VideoRecord(**clip["video"]), start, config.num_frames, stride, config.resolution, fps)

    def _prepare(self, name: str, videos: np.ndarray, first: int) -> np.ndarray:
        if name == RECONSTRUCTION:
            assert self.vae is not None
            return to_uint8(self.vae.decode_long(self.vae.encode(to_unit(torch.from_numpy(videos))).mean)).numpy()
        if name in stats.CONTROLS:
            return stats.CONTROLS[name](videos, numpy_generator("control", self.config.seed, name, first))
        return videos


def _reduce(config: EvaluateConfig, frame: pd.DataFrame) -> dict[str, Any]:
    """Distances of every set to the reference, and the means of what else was measured."""
    features = {str(name): torch.from_numpy(np.stack(part["features"].tolist())) for name, part in frame.groupby("set")}
    reference = scale_features(features[REFERENCE], features[REFERENCE])
    sets: dict[str, dict[str, float]] = {}
    for name in features:
        if name == REFERENCE:
            continue
        rows = frame[frame["set"] == name]
        scaled = scale_features(features[REFERENCE], features[name])
        sets[name] = {"distance": frechet_distance(reference.numpy(), scaled.numpy())}
        if "i3d" in rows and rows["i3d"].notna().any():
            sets[name]["fvd"] = frechet_distance(_logits(frame, REFERENCE), _logits(frame, name), FVD.ddof)
        for column in ("psnr", "motion", "recognised"):
            if column in rows and rows[column].notna().all():
                sets[name][column] = float(rows[column].astype(float).mean())
    protocol = Protocol(
        name="quick",
        metric="distance",
        network="random3d",
        weights=RandomVideoFeatures(config.extractor_seed).name,
        feature="112 pooled",
        num_frames=config.num_frames,
        stride=config.stride,
        fps=config.fps,
        resolution="as stored" if config.resolution is None else f"{config.resolution}x{config.resolution}",
        resize="none",
        value_range="[-1, 1]",
        num_real=config.num_clips,
        num_fake=config.num_clips,
        ddof=1,
        real_split=config.split,
        codec_real="as stored",
        codec_fake="as stored",
        real_data=fingerprint(frame[frame["set"] == REFERENCE]["uri"].tolist()),
    )
    extractors = {"distance": protocol.weights}
    if "fvd" in sets[REAL]:
        extractors["fvd"] = f"i3d, Kinetics-400, {len(_logits(frame, REAL))} clips a set"
    return {"protocol": asdict(protocol), "extractors": extractors, "sets": sets}


def _logits(frame: pd.DataFrame, name: str) -> np.ndarray:
    """I3D's logits of the clips of a set that have them, ``(n, 400)``."""
    return np.stack(frame[(frame["set"] == name) & frame["i3d"].notna()]["i3d"].tolist())


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def describe(values: dict[str, float]) -> str:
    """What was measured of a set beside its distance, as words."""
    parts = [f"FVD {values['fvd']:.1f}"] if "fvd" in values else []
    parts += [f"PSNR {values['psnr']:.1f} dB"] if "psnr" in values else []
    parts += [f"class recognised {100 * values['recognised']:.0f} %"] if "recognised" in values else []
    parts += [f"motion plausible {100 * values['motion']:.0f} %"] if "motion" in values else []
    return ", ".join(parts)


def _print(scores: dict[str, Any]) -> None:
    """A table on the terminal, best first."""
    say(f"distance to {scores['protocol']['num_real']} real clips, {scores['extractors']['distance']}:")
    if "fvd" in scores["extractors"]:
        say(f"FVD with {scores['extractors']['fvd']}; its floor is that of the set 'real'.")
    for name, values in sorted(scores["sets"].items(), key=lambda item: item[1]["distance"]):
        say(f"  {name:<18} {values['distance']:10.2f}   {describe(values)}")
