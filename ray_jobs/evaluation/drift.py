"""The way of long videos: every 16 frames of each set against the same real clips, as JSON, PNG and HTML."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ardiff.config import fingerprint, to_yaml
from ardiff.data import storage
from ardiff.data.manifest import VideoRecord
from ardiff.errors import ConfigError
from ardiff.metrics.drift import SEGMENT, STATISTICS, Drift, DriftReport, clip_statistics
from ardiff.metrics.protocol import recipe
from ardiff.metrics.store import FeatureStore
from ardiff.metrics.uncertainty import set_distance
from ray_jobs.evaluation.datasets import fake_clips
from ray_jobs.evaluation.features import Clip, ClipSet, Measure, extract
from ray_jobs.evaluation.metrics import Extraction, Opened, Reference, Weights, reference_clips, shared, stamps, workers
from ray_jobs.reports.drift import draw, page
from ray_jobs.runtime.stages import versions

if TYPE_CHECKING:
    from ray_jobs.evaluate import EvaluateConfig


def check(config: EvaluateConfig) -> None:
    """Raises ConfigError if the videos cannot be cut into two segments or more."""
    if config.num_frames % SEGMENT or config.num_frames < 2 * SEGMENT:
        raise ConfigError(
            f"Drift is over segments of {SEGMENT} frames: give --frames 32, 128 or another multiple of {SEGMENT}."
        )


def write(config: EvaluateConfig, weights: Weights, originals: list[VideoRecord], fakes: Opened) -> None:
    """Writes ``drift.json``, ``drift.png`` and ``drift.html`` to the output folder. Raises ArdiffError."""
    how = recipe(config.protocol, "fvd")
    short = replace(config, num_frames=SEGMENT)
    starts = range(0, config.num_frames, SEGMENT)
    clips = reference_clips(short, originals)
    segments = [fake_clips(f, records, config.num_clips, config.num_frames, s) for f, records in fakes for s in starts]
    extracted = Extraction(short, how, *weights[how.network])(clips, segments)
    real = Reference.of(short, how, clips, (shared(extracted[0][0]), extracted[0][1]))
    distances = [set_distance(real.features, features, how.distance, how.ddof) for features, _ in extracted[1:]]
    real_means, *means = _means(short, [real.clips, *segments])
    sets = []
    for number, (fake, _) in enumerate(fakes):
        mine = slice(number * len(starts), (number + 1) * len(starts))
        statistics = {name: [m[name] for m in means[mine]] for name in STATISTICS}
        sets.append(Drift(name=fake.name, fvd=distances[mine], statistics=statistics))
    report = DriftReport(
        sets=sets,
        real_fvd=real.floor,
        real_statistics=real_means,
        num_clips=config.num_clips,
        protocol=f"{config.protocol}, {how.feature}, {how.resize}",
    )
    place = functools.partial(storage.join, config.output)
    storage.write_bytes(place("drift.json"), json.dumps(asdict(report), indent=1).encode())
    storage.write_bytes(place("drift.png"), draw(report))
    storage.write_bytes(place("drift.html"), page(report, to_yaml(config), versions()).encode())


def _means(config: EvaluateConfig, sets: list[list[Clip]]) -> list[dict[str, float]]:
    """Means of the statistics over each set of clips of one segment's length."""
    stored = []
    for clips in sets:
        key = fingerprint(["statistics", config.resolution], stamps(clips))
        stored.append(ClipSet(clips, FeatureStore(storage.join(config.output, "features", f"statistics-{key}"))))
    extracted = extract("statistics", stored, measure_statistics, config.num_frames, config.resolution, workers(config))
    means = [values.array()[:, 0].mean(axis=0, dtype=np.float64).tolist() for values, _ in extracted]
    return [dict(zip(STATISTICS, values, strict=True)) for values in means]


def measure_statistics(device: torch.device) -> Measure:
    """Measures the ``STATISTICS`` of clips, ``(n, 1, 5)``."""
    return lambda clips: np.stack([clip_statistics(clip)[None] for clip in clips])
