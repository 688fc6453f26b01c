"""Drift of long videos: scores every 16 frames of each set against the same real clips."""

from dataclasses import replace

import numpy as np
import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.metrics.drift import SEGMENT, STATISTICS, Drift, DriftReport, clip_statistics, mean_statistics
from ardiff.metrics.store import FeatureStore
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.evaluation.datasets import Clip, generated_clips
from ray_jobs.evaluation.features import ClipSet, Measure, Workers, data_keys, extract
from ray_jobs.evaluation.set_metrics import Inputs, Reference, extract_features, reference_clips


def measure_drift(inputs: Inputs) -> DriftReport:
    """The distance and the mean statistics of each segment of each set. Raises ArdiffError."""
    config, spec = inputs.config, inputs.config.drift_spec
    segment_config = replace(config, num_frames=SEGMENT, drift=False)
    starts = range(0, config.num_frames, SEGMENT)
    clips = reference_clips(segment_config, inputs.real.records)
    segments = [
        generated_clips(dataset, config.num_clips, config.num_frames, start)
        for dataset in inputs.generated
        for start in starts
    ]
    state, sha256 = inputs.weights[spec.network.name]
    real_extracted, *extracted = extract_features(segment_config, spec, state, sha256, clips, segments)
    real = Reference.of(segment_config, spec, clips, real_extracted)
    distances = [spec.distance(real.features, features) for features, _ in extracted]
    real_means, *means = _mean_statistics(segment_config, [clips[: config.num_clips], *segments])
    drifts = []
    for number, dataset in enumerate(inputs.generated):
        own = slice(number * len(starts), (number + 1) * len(starts))
        statistics = {name: [m[name] for m in means[own]] for name in STATISTICS}
        drifts.append(Drift(name=dataset.name, fvd=distances[own], statistics=statistics))
    return DriftReport(
        sets=drifts,
        real_fvd=real.baseline.distance,
        real_statistics=real_means,
        num_clips=config.num_clips,
        protocol=f"{config.protocol}, {spec.feature}, {spec.resize}",
    )


def _mean_statistics(config: EvaluateConfig, sets: list[list[Clip]]) -> list[dict[str, float]]:
    """The mean of each statistic over each set of clips."""
    clip_sets = []
    for clips in sets:
        key = fingerprint(["statistics", config.num_frames, config.resolution], data_keys(clips))
        clip_sets.append(ClipSet(clips, FeatureStore(storage.join(config.output, "features", f"statistics-{key}"))))
    extracted = extract(
        "statistics", clip_sets, measure_statistics, config.num_frames, config.resolution, Workers.on_cpus(config)
    )
    return [mean_statistics(values.array()[:, 0]) for values, _ in extracted]


def measure_statistics(device: torch.device) -> Measure:
    """Measures the ``STATISTICS`` of clips, ``(n, 1, 5)``."""
    return lambda clips: np.stack([clip_statistics(clip)[None] for clip in clips])
