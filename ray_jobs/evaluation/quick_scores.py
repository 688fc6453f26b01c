"""The scores of the quick evaluation, from the measurements of its clips."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from ardiff.config import fingerprint
from ardiff.metrics.controls import CONTROLS
from ardiff.metrics.distances import Frechet, SetDistance
from ardiff.metrics.networks.random3d import NUM_FEATURES, RandomVideoFeatures, scale_features
from ardiff.metrics.notes import bias_notes
from ardiff.metrics.prompts import PROMPT_MEASURES
from ardiff.metrics.protocol import Protocol
from ardiff.metrics.scores import SetScore
from ardiff.metrics.sets.fvd import STYLEGANV as FVD
from ardiff.metrics.shapes import SHAPE_MEASURES
from ardiff.metrics.tracking import MOTION_CHECKS
from ardiff.metrics.uncertainty import Baseline, Resampling, Uncertainty, mean_with_interval
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import Dataset, codecs
from ray_jobs.evaluation.quick import I3D, REAL, REFERENCE, Sets, resolution_of

DISTANCE = Frechet(ddof=1)
"""The distance between random features."""
SHARES = (*PROMPT_MEASURES, *SHAPE_MEASURES)
"""The metrics that are shares of videos or of their frames."""
MEASUREMENTS = {**dict.fromkeys(SHARES, "mean over videos"), "psnr": "of all pixels, mean over videos"}
"""The metrics that are means over the videos of a set, with what a protocol records as their feature."""


def compute_scores(
    config: QuickConfig, frame: pd.DataFrame, sets: Sets, datasets: list[Dataset], i3d: I3D | None
) -> list[SetScore]:
    """The distance of every set to the reference, FVD of the sets with I3D logits, and the means of measurements."""
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
        feature=f"{NUM_FEATURES} pooled",
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
        choice=config.choice,
        fit=config.fit,
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
    return scores + _score_measurements(config, scores, rows)


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
    scores = []
    for name, values in features.items():
        if name == REFERENCE:
            continue
        score, uncertainty, notes = distance(reference, values), Uncertainty(), []
        if name not in CONTROLS:
            resampling = Resampling(
                distance=distance,
                partitions=config.partitions,
                seed=config.seed,
                real_videos=[clip.video.uri for clip in sets[REFERENCE][:count]],
                fake_videos=[clip.video.uri for clip in sets[name][: len(values)]],
            )
            draws = [draw(reference, values) for draw in resampling.draws()]
            uncertainty = resampling.summarize(score, values.shape[-1], draws)
            notes = bias_notes(distance, resampling, values.shape[-1], Baseline(baseline, count))
        scores.append(
            SetScore(
                set=name,
                metric=protocol.metric,
                score=score,
                baseline=baseline,
                baseline_num=None if baseline is None else count,
                **asdict(uncertainty),
                notes=tuple(notes),
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


def _score_measurements(config: QuickConfig, scores: list[SetScore], rows: dict[str, pd.DataFrame]) -> list[SetScore]:
    """The mean of each of the ``MEASUREMENTS`` over each set that has it for all its videos.

    ``scores`` has the distances of all sets. The baseline of a share is that of the set ``real``. Controls have no
    interval.
    """
    measured = []
    for metric, feature in MEASUREMENTS.items():
        columns = {s.set: rows[s.set][metric] for s in scores if s.metric == "distance" and metric in rows[s.set]}
        complete = {name: values.to_numpy(np.float64) for name, values in columns.items() if values.notna().all()}
        bounds = (0.0, 1.0) if metric in SHARES else ()
        means = {name: mean_with_interval(values, *bounds) for name, values in complete.items()}
        for score in (s for s in scores if s.metric == "distance" and s.set in means):
            mean, uncertainty = means[score.set]
            if score.set in CONTROLS:
                uncertainty = Uncertainty()
            is_share = metric in SHARES
            protocol = replace(
                score.protocol, metric=metric, network="none", weights="none", feature=feature, ddof=0,
                value_range="0 to 255",
            )  # fmt: skip
            measured.append(
                replace(
                    score,
                    metric=metric,
                    score=mean,
                    baseline=means[REAL][0] if is_share else None,
                    baseline_num=len(complete[REAL]) if is_share else None,
                    **asdict(uncertainty),
                    notes=(),
                    protocol=protocol,
                )
            )
    return measured


def by_condition(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean of each measured share over the videos of each prompt, or of each class without prompts.

    Returns:
        A row per set and condition with the columns ``set``, ``condition``, ``videos`` and a column per share. The
        conditions of a set are sorted by the first share, the smallest first. Controls are left out.
    """
    shares = [name for name in SHARES if name in frame]
    intact = frame[~frame["set"].isin([*CONTROLS, REFERENCE])]
    groups = intact.groupby(["set", "condition"])
    means = groups.size().to_frame("videos").join(groups[shares].mean()).reset_index()
    return means.sort_values(["set", *shares[:1], "condition"], ignore_index=True)


def summarize(scores: list[SetScore]) -> dict[str, Any]:
    """The scores by set and metric, and the extractor of each metric that has one."""
    sets: dict[str, dict[str, float]] = {}
    for score in scores:
        sets.setdefault(score.set, {})[score.metric] = score.score
    extractors = {s.metric: s.protocol.weights for s in scores if s.set == REAL and s.protocol.network != "none"}
    if "fvd" in extractors:
        clips = next(score.protocol.num_fake for score in scores if score.metric == "fvd")
        extractors["fvd"] = f"i3d, Kinetics-400, {clips} clips a set"
    return {"extractors": extractors, "sets": sets}


def describe(values: dict[str, float]) -> str:
    """The measurements of a set beside its distances, in words; those of earlier versions are left out."""
    texts = [f"PSNR {values['psnr']:.1f} dB"] if "psnr" in values else []
    if values.keys() >= set(SHAPE_MEASURES):
        checks = ", ".join(f"{name} {100 * values[name]:.0f}" for name in MOTION_CHECKS)
        texts += [
            f"frames of the asked class {100 * values['frame identity']:.0f} %",
            f"neighbours alike {100 * values['neighbours alike']:.0f} %",
            f"all motion checks {100 * values['motion']:.0f} % ({checks})",
        ]
    return ", ".join(texts)
