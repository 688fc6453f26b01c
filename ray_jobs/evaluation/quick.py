"""The quickstart's scores: sets of generated videos against held-out real clips, with controls beside them.

The distance is on features of a seeded random network: it ranks sets of this data among each other and is not
comparable with published FVD numbers. What makes it readable are the controls: the same number of real clips, and real
clips that were damaged on purpose. If the weights of I3D are in the cache, FVD is computed beside it, on fewer clips,
with shuffled frames as its control.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import ray
import ray.data
import torch
from rich.markup import escape

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.clips import read_clip
from ardiff.data.manifest import VideoRecord
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.errors import ConfigError
from ardiff.metrics import stats
from ardiff.metrics.extractors import Extractor
from ardiff.metrics.features import RandomVideoFeatures, scale_features
from ardiff.metrics.networks.i3d import MIN_FRAMES
from ardiff.metrics.protocol import Protocol, recipe
from ardiff.metrics.scores import SetScore, table, write_scores
from ardiff.metrics.uncertainty import centred_interval, resampled_distance, set_distance
from ardiff.metrics.weights import State, cached, find_state
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import numpy_generator
from ray_jobs.evaluation.datasets import Listed, codecs, common_size, fake_clips, locate, open_videos, real_clips
from ray_jobs.evaluation.features import Clip
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.runtime.stages import record_run, stage, versions

if TYPE_CHECKING:
    from ray_jobs.evaluate import EvaluateConfig

FVD = recipe("styleganv", "fvd")
REFERENCE, REAL, RECONSTRUCTION = "reference", "real", "reconstruction"
FVD_CONTROL = "shuffled frames"
"""The one of the controls that FVD is computed of too: I3D takes seconds a clip."""


def run(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Writes and returns the scores as every protocol has them, and by set with what else was measured:
    ``{"scores": [...], "sets": {name: {"distance": ..., ...}}, ...}``.

    Raises:
        ArdiffError: There are no held-out real clips, or a set has fewer videos than clips are asked for.
    """
    i3d, places = _i3d(config), [locate(uri) for uri in (config.real, *config.fake)]
    # Before anything starts, where it can be; the videos of a folder are looked at on Ray.
    listed = _sets(config, places) if all(place.records is not None for place in places) else None
    with ray_cluster(), stage("evaluate", config.output, key) as record:
        record_run(config.output, config)
        sets = listed or _sets(config, places)
        frame = _measure(config, sets, None if i3d is None else i3d[0])
        scores = _scores(config, frame, sets, places, "" if i3d is None else i3d[1])
        storage.write_bytes(storage.join(config.output, "features.parquet"), _parquet(frame))
        content = write_scores(config.output, scores, versions(), _summary(frame, scores))
        record.results = content
        print_line(escape(table([(score.set, score) for score in scores])))
        for name, values in content["sets"].items():
            if words := describe(values):
                print_line(f"  {escape(name)}: {words}")
    return content


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
    _size(config, sets)
    return sets


def _size(config: EvaluateConfig, sets: dict[str, list[Clip]]) -> str:
    """Height x width of all videos. Raises ConfigError if they differ and are not brought to one."""
    return common_size([clip.video for clips in sets.values() for clip in clips], config.resolution)


def _i3d(config: EvaluateConfig) -> tuple[State, str] | None:
    """The weights of I3D and their hash, if they are in the cache and FVD can be computed."""
    return find_state("i3d") if _has_i3d(config) else None


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
    with remote_progress("scoring", total, "clip") as progress:
        rows = (
            ray.data.from_items(tasks, override_num_blocks=len(tasks))
            .flat_map(
                _Scorer,
                fn_constructor_args=(config, None if state is None else ray.put(state), progress),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
                num_cpus=1,
            )
            .take_all()
        )
    # Sorted by name and index, so that the order in which tasks ended leaves no trace.
    return pd.DataFrame(rows).sort_values(["set", "index"], ignore_index=True)


class _Scorer:
    """An actor that decodes clips, damages or reconstructs them if their set asks for it, and measures them."""

    def __init__(self, config: EvaluateConfig, state: Any, progress: Any) -> None:
        torch.set_num_threads(1)
        self.config, self.progress = config, progress
        self.features = RandomVideoFeatures(config.extractor_seed)
        self.vae = load_autoencoder(config.vae) if config.vae else None
        self.i3d = None if state is None else Extractor(FVD, ray.get(state), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        config, name = self.config, task["set"]
        with report_errors(self.progress):
            clips = [self._decode(clip) for clip in task["clips"]]
        original = np.stack(clips)  # (n, F, H, W, 3)
        videos = self._prepare(name, original, int(task["first"]))
        features = self.features(torch.from_numpy(videos)).numpy()  # (n, D)
        rows = []
        for i, clip in enumerate(task["clips"]):
            uri, index = clip["video"]["uri"], int(task["first"]) + i
            row = {"set": name, "index": index, "uri": uri, "start": int(clip["start"])}
            row |= {"sha256": hashlib.sha256(videos[i].tobytes()).hexdigest(), "features": features[i].tolist()}
            if self.i3d is not None and _has_fvd(name) and index < config.i3d_clips:
                row["i3d"] = self.i3d(videos[i : i + 1])[0, 0].tolist()
            if name == RECONSTRUCTION:
                row["psnr"] = stats.psnr(original[i], videos[i])
            if config.shapes and name not in stats.CONTROLS:
                row["motion"] = all(stats.motion_checks(stats.track(videos[i])).values())
                row["recognised"] = stats.recognise(videos[i]) == clip["video"]["label"]
            rows.append(row)
        self.progress.add.remote(len(rows))
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


def _has_fvd(name: str) -> bool:
    return name not in stats.CONTROLS or name == FVD_CONTROL


def _scores(
    config: EvaluateConfig, frame: pd.DataFrame, sets: dict[str, list[Clip]], places: list[Listed], i3d_sha256: str
) -> list[SetScore]:
    """The distance of every set to the reference, and FVD of those that have I3D's logits."""
    parts = {str(name): part for name, part in frame.groupby("set")}
    features = {name: torch.from_numpy(np.stack(part["features"].tolist())) for name, part in parts.items()}
    scaled = {name: scale_features(features[REFERENCE], mine).numpy()[:, None] for name, mine in features.items()}
    real = [clip.video for clip in sets[REFERENCE]]
    protocol = Protocol(
        name="quick",
        metric="distance",
        network="random3d",
        weights=RandomVideoFeatures(config.extractor_seed).name,
        feature="112 pooled",
        num_frames=config.num_frames,
        stride=config.stride,
        fps=config.fps,
        resolution=_size(config, sets),
        resize="none",
        value_range="[-1, 1]",
        num_real=config.num_clips,
        num_fake=config.num_clips,
        ddof=1,
        real_split=places[0].split(config.split),
        codec_real=codecs(real),
        codec_fake=codecs([clip.video for fake in places[1:] for clip in sets[fake.name]] or real),
        real_data="",
    )
    scores = _of_metric(config, protocol, scaled, parts, sets, places)
    if "i3d" in frame:
        known = {name: part["i3d"].dropna().tolist() for name, part in parts.items()}
        logits = {name: np.stack(values)[:, None] for name, values in known.items() if values}
        protocol = replace(
            protocol,
            metric="fvd",
            network="i3d",
            weights=i3d_sha256,
            feature=FVD.feature,
            resize=f"{FVD.resize} to {FVD.size}x{FVD.size}",
            ddof=FVD.ddof,
        )
        scores += _of_metric(config, protocol, logits, parts, sets, places)
    return scores


def _of_metric(
    config: EvaluateConfig,
    protocol: Protocol,
    features: dict[str, np.ndarray],
    parts: dict[str, pd.DataFrame],
    sets: dict[str, list[Clip]],
    places: list[Listed],
) -> list[SetScore]:
    """A score for each set of features ``(V, 1, D)``; its floor is the distance of the set ``real``.

    There is no floor where that shares videos with the reference, and no interval of what was damaged on purpose.
    """
    real, uris, ddof = places[0], {fake.name: fake.uri for fake in places[1:]}, protocol.ddof
    reference, count = features[REFERENCE], len(features[REFERENCE])
    seen = [{clip.video.uri for clip in sets[name][:count]} for name in (REFERENCE, REAL)]
    floor = set_distance(reference, features[REAL], "frechet", ddof) if seen[0].isdisjoint(seen[1]) else None
    scores = []
    for name, mine in features.items():
        if name == REFERENCE:
            continue
        value, low, high = set_distance(reference, mine, "frechet", ddof), None, None
        if config.bootstrap and name not in stats.CONTROLS:
            draws = range(config.bootstrap)
            resampled = [resampled_distance(reference, mine, "frechet", ddof, config.seed, i) for i in draws]
            low, high = centred_interval(value, resampled)
        scores.append(
            SetScore(
                set=name,
                metric=protocol.metric,
                score=value,
                floor=floor,
                floor_num=None if floor is None else count,
                low=low,
                high=high,
                infinity=None,
                fake=uris.get(name, real.uri),
                fake_data=_data(parts[name][: len(mine)]),
                protocol=replace(
                    protocol,
                    num_real=count,
                    num_fake=len(mine),
                    real_data=_data(parts[REFERENCE][:count]),
                ),
            )
        )
    return scores


def _data(part: pd.DataFrame) -> str:
    """Names clips by their pixels and where they start."""
    return fingerprint([[sha256, int(start)] for sha256, start in zip(part["sha256"], part["start"], strict=True)])


def _summary(frame: pd.DataFrame, scores: list[SetScore]) -> dict[str, Any]:
    """The scores and the means of what else was measured, by set, and what the scores are made with."""
    sets: dict[str, dict[str, float]] = {}
    for score in scores:
        sets.setdefault(score.set, {})[score.metric] = score.score
    for name, values in sets.items():
        rows = frame[frame["set"] == name]
        for column in ("psnr", "motion", "recognised"):
            if column in rows and rows[column].notna().all():
                values[column] = float(rows[column].astype(float).mean())
    extractors = {score.metric: score.protocol.weights for score in scores if score.set == REAL}
    if "fvd" in extractors:
        clips = next(score.protocol.num_fake for score in scores if score.metric == "fvd")
        extractors["fvd"] = f"i3d, Kinetics-400, {clips} clips a set"
    return {"extractors": extractors, "sets": sets}


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def describe(values: dict[str, float]) -> str:
    """What was measured of a set beside its distances, as words."""
    parts = [f"PSNR {values['psnr']:.1f} dB"] if "psnr" in values else []
    parts += [f"class recognised {100 * values['recognised']:.0f} %"] if "recognised" in values else []
    parts += [f"motion plausible {100 * values['motion']:.0f} %"] if "motion" in values else []
    return ", ".join(parts)
