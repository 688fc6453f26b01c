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
from ardiff.metrics.drift import SEGMENT, STATISTICS, Drift, DriftReport, clip_statistics, draw, page
from ardiff.metrics.protocol import recipe
from ardiff.metrics.store import FeatureStore
from ardiff.metrics.uncertainty import set_distance
from ray_jobs.common import versions
from ray_jobs.extraction import Clip, Measure, extract
from ray_jobs.scored_sets import Listed, fake_clips
from ray_jobs.set_scores import Extraction, Opened, Weights, reference, stamps, workers

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
    extraction = Extraction(short, how, *weights[how.network])
    real = reference(short, extraction, originals)
    sets = [_along(config, extraction, real.features, fake, records) for fake, records in fakes]
    report = DriftReport(
        sets=sets,
        real_fvd=real.floor,
        real_statistics=_means(config, "real", real.clips),
        num_clips=config.num_clips,
        protocol=f"{config.protocol}, {how.feature}, {how.resize}",
    )
    place = functools.partial(storage.join, config.output)
    storage.write_bytes(place("drift.json"), json.dumps(asdict(report), indent=1).encode())
    storage.write_bytes(place("drift.png"), draw(report))
    storage.write_bytes(place("drift.html"), page(report, to_yaml(config), versions()).encode())


def _along(
    config: EvaluateConfig, extraction: Extraction, real: np.ndarray, fake: Listed, records: list[VideoRecord]
) -> Drift:
    how, distances, measured = extraction.how, [], []
    for start in range(0, config.num_frames, SEGMENT):
        clips = fake_clips(fake, records, config.num_clips, config.num_frames, start)
        features, _ = extraction.fake(f"{fake.name} from {start}", clips, SEGMENT)
        distances.append(set_distance(real, features, how.distance, how.ddof))
        measured.append(_means(config, f"{fake.name} from {start}", clips))
    return Drift(name=fake.name, fvd=distances, statistics={n: [m[n] for m in measured] for n in STATISTICS})


def _means(config: EvaluateConfig, name: str, clips: list[Clip]) -> dict[str, float]:
    """Means of the statistics over clips of one segment's length."""
    key = fingerprint(["statistics", config.resolution], stamps(clips))
    store = FeatureStore(storage.join(config.output, "features", f"statistics-{key}"))
    values, _ = extract(f"statistics: {name}", clips, store, _statistics, SEGMENT, config.resolution, workers(config))
    means = values[:, 0].mean(axis=0, dtype=np.float64)
    return {name: float(mean) for name, mean in zip(STATISTICS, means, strict=True)}


def _statistics(device: torch.device) -> Measure:
    return lambda clips: np.stack([clip_statistics(clip)[None] for clip in clips])
