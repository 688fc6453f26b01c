"""Scores of generated sets against a real one: actors extract features, tasks compute distances."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.manifest import VideoRecord
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.notes import bias_notes, rate_notes
from ardiff.metrics.protocol import VERSION, Protocol
from ardiff.metrics.registry import MetricSpec, State
from ardiff.metrics.scores import SetScore
from ardiff.metrics.store import FeatureStore, StoredClip
from ardiff.metrics.uncertainty import Baseline, Resampling, real_vs_real
from ardiff.metrics.weights import cache_folder
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.evaluation.datasets import (
    Clip,
    OpenDataset,
    codecs,
    common_size,
    frame_rates,
    generated_clips,
    real_clips,
    two_draws,
)
from ray_jobs.evaluation.features import ClipSet, Extracted, Measure, Workers, data_keys, extract
from ray_jobs.runtime.progress import progress_bar

Weights = dict[str, tuple[State, str]]
"""The weights of networks by name, and their sha256."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What an evaluation reads."""

    config: EvaluateConfig
    weights: Weights
    real: OpenDataset
    generated: list[OpenDataset]


def score_sets(inputs: Inputs, metric: str, spec: MetricSpec) -> list[SetScore]:
    """One score of the metric for each set of generated videos. Raises ArdiffError."""
    config, generated = inputs.config, inputs.generated
    sets = [generated_clips(dataset, config) for dataset in generated]
    all_records = inputs.real.records + [record for dataset in generated for record in dataset.records]
    resolution = common_size(all_records, config.resolution)
    state, sha256 = inputs.weights[spec.network.name]
    clips = reference_clips(config, inputs.real.records)
    real_extracted, *extracted = extract_features(config, spec, state, sha256, clips, sets)
    reference = Reference.of(config, spec, clips, real_extracted)
    scores = []
    for dataset, set_clips, (stored, rows) in zip(generated, sets, extracted, strict=True):
        features = to_object_store(stored)
        protocol = Protocol(
            name=config.protocol,
            metric=metric,
            network=spec.network.name,
            weights=sha256,
            feature=spec.feature,
            num_frames=config.num_frames,
            stride=config.stride,
            fps=config.fps,
            resolution=resolution,
            resize=f"{spec.resize} to {spec.network.size}x{spec.network.size}",
            value_range=spec.network.value_range,
            codec_real=_compression(inputs.real.records, spec),
            codec_fake=_compression(dataset.records, spec),
            num_real=len(reference.rows),
            num_fake=len(features),
            ddof=spec.distance.ddof,
            real_split=inputs.real.dataset.split_name(config.split),
            real_data=data_fingerprint(reference.rows),
            choice=config.choice,
        )
        score = spec.distance(reference.features, features)
        resampling = Resampling(
            distance=spec.distance,
            partitions=config.partitions,
            seed=config.seed,
            real_videos=[row.uri for row in reference.rows],
            fake_videos=[row.uri for row in rows],
        )
        distances = _resample(resampling, f"{metric} of {dataset.name}", reference.features, features)
        width = features.width
        uncertainty = resampling.summarize(score, width, distances)
        scores.append(
            SetScore(
                set=dataset.name,
                metric=metric,
                score=score,
                baseline=reference.baseline.distance,
                baseline_num=reference.baseline.num_clips,
                low=uncertainty.low,
                high=uncertainty.high,
                infinity=uncertainty.infinity,
                infinity_low=uncertainty.infinity_low,
                infinity_high=uncertainty.infinity_high,
                notes=(
                    *bias_notes(spec.distance, resampling, width, reference.baseline),
                    *rate_notes(*(frame_rates(side) for side in (clips, set_clips))),
                ),
                fake=dataset.dataset.uri,
                fake_data=data_fingerprint(rows),
                protocol=protocol,
            )
        )
    return scores


def reference_clips(config: EvaluateConfig, records: list[VideoRecord]) -> list[Clip]:
    """The real clips, and as many clips of other videos for the baseline if there are enough videos."""
    if len(records) < 2 * config.num_clips:
        most = len(records) if config.protocol == "styleganv" else config.num_clips  # at most one clip of a video
        return real_clips(records, min(config.num_clips, most), config)
    reference, others = two_draws(records, config.num_clips, config)
    return reference + others


def extract_features(
    config: EvaluateConfig, spec: MetricSpec, state: State, sha256: str, real: list[Clip], sets: list[list[Clip]]
) -> list[Extracted]:
    """Features of the real clips, then of each set.

    The features of real clips go to the cache, those of the sets to the output folder. The names of their folders
    depend on the network, its weights, the preprocessing and the data.
    """
    network = spec.network
    preprocessing = [dict(spec.options), network.size, spec.resize, network.value_range, spec.reencode]
    settings = [network.name, sha256, *preprocessing, config.num_frames, config.resolution, VERSION]

    def clip_set(root: str, clips: list[Clip]) -> ClipSet:
        key = fingerprint(settings, data_keys(clips))
        return ClipSet(clips, FeatureStore(storage.join(root, "features", f"{network.name}-{key}")))

    clip_sets = [clip_set(config.cache or str(cache_folder()), real)]
    clip_sets += [clip_set(config.output, clips) for clips in sets]
    build = functools.partial(_build_extractor, spec, ray.put(state))
    return extract(network.name, clip_sets, build, config.num_frames, config.resolution, Workers.of(config))


def _build_extractor(spec: MetricSpec, state: Any, device: torch.device) -> Measure:
    return FeatureExtractor(spec, ray.get(state), device)


@dataclass(frozen=True, slots=True)
class Reference:
    """The real clips that sets are compared with."""

    features: VideoFeatures
    rows: list[StoredClip]
    baseline: Baseline

    @classmethod
    def of(cls, config: EvaluateConfig, spec: MetricSpec, clips: list[Clip], extracted: Extracted) -> Reference:
        """The reference and its baseline, from the features of :func:`reference_clips`."""
        count, features = min(config.num_clips, len(clips)), to_object_store(extracted[0])
        videos = [(clip.video.uri, clip.video.label) for clip in clips]
        baseline = real_vs_real(features, videos, count, spec.distance)
        return cls(features[:count], extracted[1][:count], baseline)


def to_object_store(features: VideoFeatures) -> VideoFeatures:
    """Puts features into Ray's object store block by block. It spills to disk what does not fit into memory."""
    blocks = [ray.put(block) for block in features]
    return VideoFeatures.of(functools.partial(_read_blocks, blocks), len(features))


def _read_blocks(blocks: list[Any]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield ray.get(block)


def _resample(resampling: Resampling, label: str, real: VideoFeatures, fake: VideoFeatures) -> list[list[float]]:
    """The distances of the partitions. Each partition is a task of the cluster."""
    call, sides = ray.remote(_call), (ray.put(real), ray.put(fake))
    tasks: list[Any] = [call.remote(draw, *sides) for draw in resampling.draws()]
    with progress_bar(f"interval: {label}", len(tasks), "partition") as bar:
        waiting = list(tasks)
        while waiting:
            _, waiting = ray.wait(waiting, timeout=1.0, num_returns=len(waiting))
            bar.update(len(tasks) - len(waiting))
    return ray.get(tasks)


def _call(draw: Any, real: VideoFeatures, fake: VideoFeatures) -> list[float]:
    return draw(real, fake)


def data_fingerprint(rows: list[StoredClip], side: int = -1) -> str:
    """Identifies clips by their pixels and where they start; of pairs, one side: 0 the originals, -1 the others."""
    return fingerprint([[row.sha256.split(":")[side], row.start] for row in rows])


def _compression(records: list[VideoRecord], spec: MetricSpec) -> str:
    return f"{codecs(records)}, then mpeg4 at 25 fps" if spec.reencode else codecs(records)
