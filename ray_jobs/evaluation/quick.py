"""The parts of the quick evaluation: its sets of clips, their measurement on actors, and the scores."""

import hashlib
import io
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.data
import torch

from ardiff.config import fingerprint
from ardiff.data.clips import read_clip
from ardiff.data.manifest import VideoRecord
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.errors import ConfigError
from ardiff.metrics.controls import CONTROLS
from ardiff.metrics.distances import Frechet, SetDistance
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.networks.i3d import MIN_FRAMES
from ardiff.metrics.networks.random3d import RandomVideoFeatures, scale_features
from ardiff.metrics.pairs.psnr import psnr
from ardiff.metrics.protocol import Protocol
from ardiff.metrics.registry import State
from ardiff.metrics.scores import SetScore
from ardiff.metrics.sets.fvd import STYLEGANV as FVD
from ardiff.metrics.shapes import recognise
from ardiff.metrics.tracking import motion_checks, track
from ardiff.metrics.uncertainty import Resampling, Uncertainty
from ardiff.metrics.weights import cached, find_state
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import numpy_generator
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import (
    Clip,
    Dataset,
    codecs,
    common_size,
    generated_clips,
    open_videos,
    real_clips,
)
from ray_jobs.runtime.progress import remote_progress, report_errors

REFERENCE, REAL, RECONSTRUCTION = "reference", "real", "reconstruction"
FVD_CONTROL = "shuffled frames"
"""The only control of FVD: I3D takes seconds per clip."""
DISTANCE = Frechet(ddof=1)
"""The distance between random features."""
Sets = dict[str, list[Clip]]
"""The clips of each set by its name."""
I3D = tuple[State, str]
"""The weights of I3D and their sha256."""


def find_i3d(config: QuickConfig) -> I3D | None:
    """The weights of I3D if they are in the cache and the clips are long enough for FVD."""
    return find_state("i3d") if _has_i3d(config) else None


def _has_i3d(config: QuickConfig) -> bool:
    return config.i3d_clips > 0 and config.num_frames >= MIN_FRAMES and cached("i3d").exists()


def lacks_fvd(config: QuickConfig, scores: dict[str, Any]) -> bool:
    """Whether the scores have no FVD although the weights are in the cache now."""
    return "fvd" not in scores["extractors"] and _has_i3d(config)


# -------------------------------------------------------------------------------------------------------------- clips


def clip_sets(config: QuickConfig, datasets: list[Dataset]) -> Sets:
    """The clips of every set: the reference, as many other real clips, intact and damaged, and the generated ones."""
    real, *generated = datasets
    count = config.num_clips
    clips = real_clips(open_videos(real, config.split, config.span, config.fps).records, 2 * count, config)
    derived = [REAL, *([RECONSTRUCTION] if config.vae else []), *(CONTROLS if config.controls else ())]
    sets = {REFERENCE: clips[:count], **dict.fromkeys(derived, clips[count:])}
    for dataset in generated:
        if (name := dataset.name) in sets:
            raise ConfigError(f"Two sets are called '{name}': keep generated videos in folders of different names.")
        sets[name] = generated_clips(open_videos(dataset, "test", config.num_frames), count, config.num_frames)
    resolution_of(config, sets)
    return sets


def resolution_of(config: QuickConfig, sets: Sets) -> str:
    """Height x width of all videos. Raises ConfigError if they differ and no ``resolution`` is given."""
    return common_size([clip.video for clips in sets.values() for clip in clips], config.resolution)


def has_fvd(name: str) -> bool:
    """Whether FVD is computed for the set."""
    return name not in CONTROLS or name == FVD_CONTROL


# -------------------------------------------------------------------------------------------------------- measurement


def measure(config: QuickConfig, sets: Sets, i3d: I3D | None) -> pd.DataFrame:
    """One row per clip: set, index, features and other measurements."""
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
                _Actor,
                fn_constructor_args=(config, None if i3d is None else ray.put(i3d[0]), progress),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
                num_cpus=1,
            )
            .take_all()
        )
    # Sorted, so that the rows do not depend on the order in which tasks end.
    return pd.DataFrame(rows).sort_values(["set", "index"], ignore_index=True)


class _Actor:
    """A Ray actor that decodes clips, damages or reconstructs those of the derived sets, and measures them."""

    def __init__(self, config: QuickConfig, i3d_state: Any, progress: Any) -> None:
        torch.set_num_threads(1)
        self.config, self.progress = config, progress
        self.features = RandomVideoFeatures(config.extractor_seed)
        self.vae = load_autoencoder(config.vae) if config.vae else None
        self.i3d = None if i3d_state is None else FeatureExtractor(FVD, ray.get(i3d_state), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        config, name = self.config, task["set"]
        with report_errors(self.progress):
            clips = [self._decode(clip) for clip in task["clips"]]
        original = np.stack(clips)  # (n, F, H, W, 3)
        videos = self._derive(name, original, int(task["first"]))
        features = self.features(torch.from_numpy(videos)).numpy()  # (n, D)
        rows = []
        for i, clip in enumerate(task["clips"]):
            uri, index = clip["video"]["uri"], int(task["first"]) + i
            row = {"set": name, "index": index, "uri": uri, "start": int(clip["start"])}
            row |= {"sha256": hashlib.sha256(videos[i].tobytes()).hexdigest(), "features": features[i].tolist()}
            if self.i3d is not None and has_fvd(name) and index < config.i3d_clips:
                row["i3d"] = self.i3d(videos[i : i + 1])[0, 0].tolist()
            if name == RECONSTRUCTION:
                row["psnr"] = psnr(original[i], videos[i])
            if config.shapes and name not in CONTROLS:
                row["motion"] = all(motion_checks(track(videos[i])).values())
                row["recognised"] = recognise(videos[i]) == clip["video"]["label"]
            rows.append(row)
        self.progress.add.remote(len(rows))
        return rows

    def _decode(self, clip: dict[str, Any]) -> np.ndarray:
        start, stride, fps, config = int(clip["start"]), int(clip["stride"]), float(clip["fps"]), self.config
        return read_clip(VideoRecord(**clip["video"]), start, config.num_frames, stride, config.resolution, fps)

    def _derive(self, name: str, videos: np.ndarray, first: int) -> np.ndarray:
        """The videos of the set ``name``, from real ones if it is a derived set."""
        if name == RECONSTRUCTION:
            assert self.vae is not None
            return to_uint8(self.vae.decode_long(self.vae.encode(to_unit(torch.from_numpy(videos))).mean)).numpy()
        if name in CONTROLS:
            return CONTROLS[name](videos, numpy_generator("control", self.config.seed, name, first))
        return videos


# ------------------------------------------------------------------------------------------------------------- scores


def compute_scores(
    config: QuickConfig, frame: pd.DataFrame, sets: Sets, datasets: list[Dataset], i3d: I3D | None
) -> list[SetScore]:
    """The distance of every set to the reference, and FVD of the sets with I3D logits."""
    rows = {str(name): group for name, group in frame.groupby("set")}
    features = {name: torch.from_numpy(np.stack(group["features"].tolist())) for name, group in rows.items()}
    scaled = {name: scale_features(features[REFERENCE], values).numpy()[:, None] for name, values in features.items()}
    real = [clip.video for clip in sets[REFERENCE]]
    generated = [clip.video for dataset in datasets[1:] for clip in sets[dataset.name]]
    protocol = Protocol(
        name="quick",
        metric="distance",
        network="random3d",
        weights=RandomVideoFeatures(config.extractor_seed).name,
        feature="128 pooled",
        num_frames=config.num_frames,
        stride=config.stride,
        fps=config.fps,
        resolution=resolution_of(config, sets),
        resize="none",
        value_range="[-1, 1]",
        num_real=config.num_clips,
        num_fake=config.num_clips,
        ddof=DISTANCE.ddof,
        real_split=datasets[0].split_name(config.split),
        codec_real=codecs(real),
        codec_fake=codecs(generated or real),
        real_data="",
    )
    scores = _score_metric(config, protocol, DISTANCE, scaled, rows, sets, datasets)
    if i3d is not None:
        logits = {name: group["i3d"].dropna().tolist() for name, group in rows.items()}
        arrays = {name: np.stack(values)[:, None] for name, values in logits.items() if values}
        protocol = replace(
            protocol,
            metric="fvd",
            network="i3d",
            weights=i3d[1],
            feature=FVD.feature,
            resize=f"{FVD.resize} to {FVD.network.size}x{FVD.network.size}",
            ddof=FVD.distance.ddof,
        )
        scores += _score_metric(config, protocol, FVD.distance, arrays, rows, sets, datasets)
    return scores


def _score_metric(
    config: QuickConfig,
    protocol: Protocol,
    distance: SetDistance,
    features: dict[str, np.ndarray],
    rows: dict[str, pd.DataFrame],
    sets: Sets,
    datasets: list[Dataset],
) -> list[SetScore]:
    """A score of each set from its features ``(V, 1, D)``.

    The baseline is the distance of the set ``real``. There is none if that set shares videos with the reference.
    Controls have no interval.
    """
    uris = {dataset.name: dataset.uri for dataset in datasets[1:]}
    reference, count = features[REFERENCE], len(features[REFERENCE])
    reference_videos, real_videos = ({clip.video.uri for clip in sets[name][:count]} for name in (REFERENCE, REAL))
    baseline = distance(reference, features[REAL]) if reference_videos.isdisjoint(real_videos) else None
    resampling = Resampling(
        distance=distance, num_videos=count, bootstrap=config.bootstrap, seed=config.seed, extrapolate=False
    )
    scores = []
    for name, values in features.items():
        if name == REFERENCE:
            continue
        score, uncertainty = distance(reference, values), Uncertainty()
        if name not in CONTROLS:
            uncertainty = resampling.summarize(score, [draw(reference, values) for draw in resampling.draws()])
        scores.append(
            SetScore(
                set=name,
                metric=protocol.metric,
                score=score,
                baseline=baseline,
                baseline_num=None if baseline is None else count,
                low=uncertainty.low,
                high=uncertainty.high,
                infinity=uncertainty.infinity,
                fake=uris.get(name, datasets[0].uri),
                fake_data=_data_fingerprint(rows[name][: len(values)]),
                protocol=replace(
                    protocol,
                    num_real=count,
                    num_fake=len(values),
                    real_data=_data_fingerprint(rows[REFERENCE][:count]),
                ),
            )
        )
    return scores


def _data_fingerprint(rows: pd.DataFrame) -> str:
    """Identifies clips by their pixels and where they start."""
    return fingerprint([[sha256, int(start)] for sha256, start in zip(rows["sha256"], rows["start"], strict=True)])


def summarize(frame: pd.DataFrame, scores: list[SetScore]) -> dict[str, Any]:
    """The scores and the means of the other measurements by set, and the extractor of each metric."""
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


def to_parquet(frame: pd.DataFrame) -> bytes:
    """The measurements as a Parquet file."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def describe(values: dict[str, float]) -> str:
    """The measurements of a set beside its distances, in words."""
    texts = [f"PSNR {values['psnr']:.1f} dB"] if "psnr" in values else []
    texts += [f"class recognised {100 * values['recognised']:.0f} %"] if "recognised" in values else []
    texts += [f"motion plausible {100 * values['motion']:.0f} %"] if "motion" in values else []
    return ", ".join(texts)
