"""Scores of generated sets against a real one: actors extract features. Earlier scores of the same data are reused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.latents import vae_fingerprint
from ardiff.data.manifest import VideoRecord
from ardiff.metrics.compiled import Backend
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.notes import rate_notes
from ardiff.metrics.protocol import VERSION, Protocol
from ardiff.metrics.registry import MetricSpec, State
from ardiff.metrics.scores import SetScore, score_of
from ardiff.metrics.store import FeatureStore
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
from ray_jobs.evaluation.estimates import GeneratedSet, Reference, checked_clips, data_fingerprint, estimate_score
from ray_jobs.evaluation.features import ClipSet, Extracted, Measure, Workers, data_keys, extract, read_stored
from ray_jobs.evaluation.reconstruction import CODEC, NAME

Weights = dict[str, tuple[State, str]]
"""The weights of networks by name, and their sha256."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What an evaluation reads."""

    config: EvaluateConfig
    weights: Weights
    real: OpenDataset
    generated: list[OpenDataset]
    train: OpenDataset | None
    """The videos that the model was trained on."""
    join_cluster: Callable[[], None]
    """Joins or starts the Ray cluster, unless that was done before."""


def score_sets(inputs: Inputs, metric: str, spec: MetricSpec) -> list[SetScore]:
    """One score of the metric for each set of generated videos. Raises ArdiffError.

    Scores whose data and settings are those of an earlier evaluation are read from its files.
    """
    config = inputs.config
    clips = reference_clips(config, inputs.real.records)
    sets = evaluation_sets(inputs, clips[: config.num_clips])
    all_records = inputs.real.records + [record for scored in sets for record in scored.records]
    training = _training_clips(inputs, spec, sets)
    stores = FeatureStores.of(config, spec, inputs.weights[spec.network.name][1], [clips, training], sets)
    files = [stores.score_file(config, metric, number) for number in range(len(sets))]
    scores = [_read_score(file, scored) for file, scored in zip(files, sets, strict=True)]
    if all(scores):
        return [score for score in scores if score is not None]
    real_extracted, training_extracted, *extracted = stores.extract(inputs, config)
    videos = [(clip.video.uri, clip.video.label) for clip in clips]
    reference = Reference.of(config.num_clips, spec.distance, videos, real_extracted)
    common = Protocol(
        name=config.protocol,
        metric=metric,
        network=spec.network.name,
        weights=inputs.weights[spec.network.name][1],
        feature=spec.feature,
        num_frames=config.num_frames,
        stride=config.stride,
        fps=config.fps,
        resolution=common_size(all_records, config.resolution),
        resize=f"{spec.resize} to {spec.network.size}x{spec.network.size}",
        value_range=spec.network.value_range,
        codec_real=_compression(codecs(inputs.real.records), spec),
        codec_fake="",
        num_real=len(reference.rows),
        num_fake=config.num_clips,
        ddof=spec.distance.ddof,
        real_split=inputs.real.dataset.split_name(config.split),
        real_data=data_fingerprint(reference.rows),
        choice=config.choice,
        fit=config.fit,
    )
    real_rates, train = frame_rates(clips), checked_clips(*training_extracted) if training else None
    for number, (scored, result) in enumerate(zip(sets, extracted, strict=True)):
        if scores[number] is None:
            codec = _compression(scored.codec, spec)
            protocol = replace(common, codec_fake=codec, num_fake=len(scored.clips))
            own = GeneratedSet.of(scored.name, scored.uri, result, from_reference=bool(scored.vae))
            label = f"{metric} of {scored.name}"
            score = estimate_score(config, spec.distance, protocol, reference, own, train, label)
            score = replace(score, notes=(*score.notes, *rate_notes(real_rates, frame_rates(scored.clips))))
            storage.write_bytes(files[number], json.dumps(asdict(score)).encode())
            scores[number] = score
    return [score for score in scores if score is not None]


def _training_clips(inputs: Inputs, spec: MetricSpec, sets: list[EvaluationSet]) -> list[Clip]:
    """Clips of the training videos; none if no set is checked for copies of them."""
    if inputs.train is None or spec.network.per_frame or all(scored.vae for scored in sets):
        return []
    return real_clips(inputs.train.records, len(inputs.train.records), inputs.config)


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """A set of clips to score: generated videos, or reconstructions of real clips."""

    name: str
    uri: str
    clips: list[Clip]
    records: list[VideoRecord]
    """The videos of a dataset."""
    codec: str
    vae: str = ""
    """An AR-VAE folder: its reconstructions of the clips are scored."""


def evaluation_sets(inputs: Inputs, real: list[Clip]) -> list[EvaluationSet]:
    """The sets of an evaluation. ``real`` are the real clips that an AR-VAE reconstructs. Raises DataError."""
    sets = [
        EvaluationSet(d.name, d.dataset.uri, generated_clips(d, inputs.config), d.records, codecs(d.records))
        for d in inputs.generated
    ]
    if (vae := inputs.config.reconstruct) is not None:
        sets.append(EvaluationSet(NAME, vae, real, [], CODEC, vae))
    return sets


def _read_score(file: str, scored: EvaluationSet) -> SetScore | None:
    """A stored score of the set; None if there is none."""
    if not storage.exists(file):
        return None
    return replace(score_of(json.loads(storage.read_bytes(file))), set=scored.name, fake=scored.uri)


def reference_clips(config: EvaluateConfig, records: list[VideoRecord]) -> list[Clip]:
    """The real clips, and as many clips of other videos for the baseline if there are enough videos."""
    if len(records) < 2 * config.num_clips:
        several = config.protocol == "ardiff-release"  # the others take at most one clip of a video
        most = config.num_clips if several else len(records)
        return real_clips(records, min(config.num_clips, most), config)
    reference, others = two_draws(records, config.num_clips, config)
    return reference + others


@dataclass(frozen=True, slots=True)
class FeatureStores:
    """Where the features of real clips, of training clips and of each set are, or will be.

    Those of real and training clips are in the cache, those of sets in the output folder. The names of their folders
    depend on the network, its weights, the preprocessing and the data.
    """

    spec: MetricSpec
    clip_sets: list[ClipSet]

    @classmethod
    def of(
        cls, config: EvaluateConfig, spec: MetricSpec, sha256: str, real: list[list[Clip]], sets: list[EvaluationSet]
    ) -> FeatureStores:
        """The stores of lists of real clips, then of sets."""
        network = spec.network
        preprocessing = [dict(spec.options), network.size, spec.resize, network.value_range, spec.reencode]
        settings = [network.name, sha256, *preprocessing, config.num_frames, config.resolution, VERSION]
        settings += [] if config.backend == "torch" else [config.backend]

        def clip_set(root: str, clips: list[Clip], vae: str) -> ClipSet:
            key = fingerprint([*settings, *([vae_fingerprint(vae)] if vae else [])], data_keys(clips))
            store = FeatureStore(storage.join(root, "features", f"{network.name}-{key}"))
            return ClipSet(clips, store, vae)

        clip_sets = [clip_set(config.cache_uri, clips, "") for clips in real]
        clip_sets += [clip_set(config.output, scored.clips, scored.vae) for scored in sets]
        return cls(spec, clip_sets)

    def extract(self, inputs: Inputs, config: EvaluateConfig) -> list[Extracted]:
        """The features of all clips. Raises ArdiffError."""
        if (stored := read_stored(self.clip_sets)) is not None:
            return stored
        inputs.join_cluster()
        name = self.spec.network.name
        build = functools.partial(_build_extractor, self.spec, shared(inputs.weights[name][0]), config.backend)
        workers = Workers.of(config)
        return extract(name, self.clip_sets, build, config.num_frames, config.resolution, workers)

    def score_file(self, config: EvaluateConfig, metric: str, number: int) -> str:
        """Where the score of set ``number`` is kept. The name depends on all data and settings."""
        folders = [
            clip_set.store.folder.rpartition("/")[2] for clip_set in (*self.clip_sets[:2], self.clip_sets[2 + number])
        ]
        settings = [metric, config.protocol, config.split, config.partitions, config.seed, config.num_clips]
        return storage.join(config.output, "scores", f"{fingerprint(settings, folders)}.json")


def shared(state: Any) -> Any:
    """Weights that Ray puts into its object store when it first sends them, and that arrive as they were."""
    return _Shared(state)


class _Shared:
    def __init__(self, state: Any) -> None:
        self.state = state
        self.reference: Any = None

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        self.reference = self.reference or ray.put(self.state)
        return ray.get, (self.reference,)


def _build_extractor(spec: MetricSpec, state: State, backend: Backend, device: torch.device) -> Measure:
    return FeatureExtractor(spec, state, device, backend)


def _compression(codec: str, spec: MetricSpec) -> str:
    return f"{codec}, then mpeg4 at 25 fps" if spec.reencode else codec
