"""Drift of long videos: scores every 16 frames of each set against the same real clips."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.manifest import VideoRecord
from ardiff.metrics.drift import (
    SEGMENT,
    STATISTICS,
    Drift,
    DriftError,
    DriftReport,
    clip_statistics,
    colour_drift,
    content_colour,
    mean_shape_statistics,
    mean_statistics,
    shape_statistics,
)
from ardiff.metrics.store import FeatureStore
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.evaluation.datasets import Clip, generated_clips, real_clips
from ray_jobs.evaluation.estimates import Reference
from ray_jobs.evaluation.features import ClipSet, Measure, Workers, data_keys, extract, read_stored
from ray_jobs.evaluation.set_metrics import EvaluationSet, FeatureStores, Inputs, reference_clips


def measure_drift(inputs: Inputs) -> DriftReport:
    """The distance, the mean statistics and the colour of each segment of each set. Raises ArdiffError."""
    config, spec = inputs.config, inputs.config.drift_spec
    segment_config = replace(config, num_frames=SEGMENT, drift=False, shapes=False)
    starts = range(0, config.num_frames, SEGMENT)
    clips = reference_clips(segment_config, inputs.real.records)
    segments = [generated_clips(dataset, config, start) for dataset in inputs.generated for start in starts]
    stores = FeatureStores.of(
        segment_config,
        spec,
        inputs.weights[spec.network.name][1],
        [clips],
        [EvaluationSet("segment", "", segment, [], "") for segment in segments],
    )
    real_extracted, *extracted = stores.extract(inputs, segment_config)
    videos = [(clip.video.uri, clip.video.label) for clip in clips]
    real = Reference.of(config.num_clips, spec.distance, videos, real_extracted)
    distances = [spec.distance(real.features, features) for features, _ in extracted]
    real_segments = _segments_of_real_clips(config, inputs.real.records)
    sets = [clips[: config.num_clips], *segments, *real_segments]
    real_means, *means = _measure_segments(segment_config, config.shapes, sets, inputs.join_cluster)
    drifts = []
    for number, dataset in enumerate(inputs.generated):
        own = slice(number * len(starts), (number + 1) * len(starts))
        statistics = {name: [m.statistics[name] for m in means[own]] for name in real_means.statistics}
        colour = colour_drift(np.stack([m.colours for m in means[own]]))
        error = DriftError.of(np.stack([m.videos for m in means[own]]))
        drifts.append(Drift(name=dataset.name, fvd=distances[own], statistics=statistics, colour=colour, error=error))
    return DriftReport(
        sets=drifts,
        real_fvd=real.baseline.distance,
        real_statistics=real_means.statistics,
        real_error=DriftError.of(np.stack([m.videos for m in means[len(segments) :]])),
        num_clips=config.num_clips,
        protocol=f"{config.protocol}, {spec.feature}, {spec.resize}",
    )


def _segments_of_real_clips(config: EvaluateConfig, records: list[VideoRecord]) -> list[list[Clip]]:
    """The segments of real clips that are as long as the generated videos, segment by segment."""
    clips = real_clips(records, min(config.num_clips, max(len(records), 2)), config)
    starts = range(0, config.num_frames * config.stride, SEGMENT * config.stride)
    return [[replace(clip, start=clip.start + start) for clip in clips] for start in starts]


@dataclass(frozen=True, slots=True)
class _Segment:
    """The measurements of one segment of a set of videos."""

    statistics: dict[str, float]
    """Means over videos."""
    videos: np.ndarray
    """The ``STATISTICS`` of each video, float32 ``(V, 5)``."""
    colours: np.ndarray
    """float32 ``(V, 3)``."""


def _measure_segments(
    config: EvaluateConfig, shapes: bool, sets: list[list[Clip]], join_cluster: Callable[[], None]
) -> list[_Segment]:
    """The measurements of each set of clips."""
    clip_sets = []
    for clips in sets:
        key = fingerprint(["segments", shapes, config.num_frames, config.resolution], data_keys(clips))
        clip_sets.append(ClipSet(clips, FeatureStore(storage.join(config.output, "features", f"segments-{key}"))))
    build = functools.partial(_measure_segment, shapes)
    extracted = read_stored(clip_sets)
    if extracted is None:
        join_cluster()
        workers = Workers.on_cpus(config)
        extracted = extract("statistics", clip_sets, build, config.num_frames, config.resolution, workers)
    return [
        _summarize(values.array()[:, 0], [clip.video.label for clip in clips])
        for (values, _), clips in zip(extracted, sets, strict=True)
    ]


def _summarize(values: np.ndarray, labels: list[int]) -> _Segment:
    """From the measurements of :func:`_measure_segment`, ``(V, D)``."""
    simple, colours, shapes = np.split(values, [len(STATISTICS), len(STATISTICS) + 3], axis=1)
    statistics = mean_statistics(simple) | (mean_shape_statistics(shapes, labels) if shapes.size else {})
    return _Segment(statistics, simple, colours)


def _measure_segment(shapes: bool, device: torch.device) -> Measure:
    """Measures clips, ``(n, 1, D)``: the ``STATISTICS``, the colour and, with ``shapes``, what each frame shows."""

    def measure(clip: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [clip_statistics(clip), content_colour(clip), *([shape_statistics(clip)] if shapes else [])]
        )

    return lambda clips: np.stack([measure(clip)[None] for clip in clips])


def measure_statistics(device: torch.device) -> Measure:
    """Measures the ``STATISTICS`` of clips, ``(n, 1, 5)``."""
    return lambda clips: np.stack([clip_statistics(clip)[None] for clip in clips])
