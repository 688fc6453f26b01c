"""From features of real and generated clips to scores: distance, interval, baseline, checks and notes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from ardiff.config import fingerprint
from ardiff.metrics.distances import SetDistance
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.manifold import CheckedClips, SetChecks, check_set
from ardiff.metrics.notes import bias_notes
from ardiff.metrics.protocol import Protocol
from ardiff.metrics.scores import SetScore
from ardiff.metrics.store import StoredClip
from ardiff.metrics.uncertainty import Baseline, PartitionDraw, Resampling, baseline_sides, real_vs_real
from ray_jobs.evaluation.config import ScoredClips
from ray_jobs.evaluation.features import Extracted
from ray_jobs.runtime.progress import progress_bar

MAX_LOCAL_VALUES = 2**26
"""Features that this process keeps in memory without a cluster: 256 MiB."""
BELOW_BASELINE = (
    "The score is below real vs real, which no better video explains: sets that vary less than real videos, or copy "
    "them, score so."
)


@dataclass(frozen=True, slots=True)
class GeneratedSet:
    """The features of generated clips."""

    name: str
    uri: str
    features: VideoFeatures
    rows: list[StoredClip]
    from_reference: bool = False
    """Whether the clips are made from the real clips that they are compared with: they are meant to be near them."""

    @classmethod
    def of(cls, name: str, uri: str, extracted: Extracted, from_reference: bool = False) -> GeneratedSet:
        """The features of clips."""
        return cls(name, uri, in_memory(extracted[0]), extracted[1], from_reference)


def estimate_score(
    config: ScoredClips,
    distance: SetDistance,
    protocol: Protocol,
    reference: Reference,
    generated: GeneratedSet,
    training: CheckedClips | None,
    label: str,
) -> SetScore:
    """The score of one set: distance, interval, baseline and checks. ``label`` names the progress bar."""
    score = distance(reference.features, generated.features)
    resampling = Resampling(
        distance=distance,
        partitions=config.partitions,
        seed=config.seed,
        real_videos=[row.uri for row in reference.rows],
        fake_videos=[row.uri for row in generated.rows],
    )
    width, baseline = generated.features.width, reference.baseline
    uncertainty = resampling.summarize(
        score, width, _resample(resampling, label, reference.features, generated.features)
    )
    checks = reference.check(generated, training)
    same_size = baseline.num_clips == len(reference.rows)  # a baseline of fewer clips is larger
    below = same_size and uncertainty.high is not None and uncertainty.high < (baseline.distance or 0.0)
    notes = [*bias_notes(distance, resampling, width, baseline), *(checks.warnings() if checks else [])]
    if below and distance.biased and not generated.from_reference:
        notes.append(BELOW_BASELINE)
    return SetScore(
        set=generated.name,
        metric=protocol.metric,
        score=score,
        baseline=baseline.distance,
        baseline_num=baseline.num_clips,
        **asdict(uncertainty),
        checks=checks,
        notes=tuple(notes),
        fake=generated.uri,
        fake_data=data_fingerprint(generated.rows),
        protocol=protocol,
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """The real clips that sets are compared with."""

    features: VideoFeatures
    rows: list[StoredClip]
    baseline: Baseline

    held_out: tuple[CheckedClips, CheckedClips] | None
    """Real clips and others of other videos, to compare neighbours; None for features of single frames."""

    @classmethod
    def of(
        cls, count: int, distance: SetDistance, videos: Sequence[tuple[str, int]], extracted: Extracted
    ) -> Reference:
        """The first ``count`` clips, with the others as baseline. ``videos`` has name and class of each video."""
        features, rows = in_memory(extracted[0]), extracted[1]
        baseline = real_vs_real(features, videos, count, distance)
        held_out = None
        if features.depth == 1:
            clips = checked_clips(features, rows)
            left, right = baseline_sides(videos, count)
            held_out = clips[left], clips[right]
        return cls(features[:count], rows[:count], baseline, held_out)

    def check(self, generated: GeneratedSet, training: CheckedClips | None) -> SetChecks | None:
        """The checks of a set; None for features of single frames and for clips made from the reference."""
        if self.held_out is None or generated.from_reference:
            return None
        return check_set(*self.held_out, checked_clips(generated.features, generated.rows), training)


def checked_clips(features: VideoFeatures, rows: Sequence[StoredClip]) -> CheckedClips:
    """Features ``(V, 1, D)`` of clips with their URIs and hashes."""
    return CheckedClips(
        features.array()[:, 0], [row.uri for row in rows], [row.sha256.rpartition(":")[2] for row in rows]
    )


def in_memory(features: VideoFeatures) -> VideoFeatures:
    """Reads features once, for several passes over them.

    With a cluster they are in its object store, which spills to disk what does not fit into memory. Without one they
    stay where they are if they are large.
    """
    if ray.is_initialized():
        references = [ray.put(block) for block in features]
        return VideoFeatures.of(functools.partial(_read_blocks, references), len(features))
    if len(features) * features.depth * features.width > MAX_LOCAL_VALUES:
        return features
    return VideoFeatures.wrap(features.array())


def _read_blocks(blocks: list[Any]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield ray.get(block)


def _resample(resampling: Resampling, label: str, real: VideoFeatures, fake: VideoFeatures) -> list[list[float]]:
    """The distances of the partitions. Each partition is a task of the cluster, if there is one."""
    if not ray.is_initialized():
        return [draw(real, fake) for draw in resampling.draws()]
    call, sides = ray.remote(_call), (ray.put(real), ray.put(fake))
    tasks: list[Any] = [call.remote(draw, *sides) for draw in resampling.draws()]
    with progress_bar(f"interval: {label}", len(tasks), "partition") as bar:
        waiting = list(tasks)
        while waiting:
            _, waiting = ray.wait(waiting, timeout=1.0, num_returns=len(waiting))
            bar.update(len(tasks) - len(waiting))
    distances: list[list[float]] = ray.get(tasks)
    return distances


def _call(draw: PartitionDraw, real: VideoFeatures, fake: VideoFeatures) -> list[float]:
    return draw(real, fake)


def data_fingerprint(rows: list[StoredClip], side: int = -1) -> str:
    """Identifies clips by their pixels and where they start; of pairs, one side: 0 the originals, -1 the others."""
    return fingerprint([[row.sha256.split(":")[side], row.start] for row in rows])
