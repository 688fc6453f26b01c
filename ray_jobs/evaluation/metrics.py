"""Scores of sets against sets and of videos against their originals: features from actors, statistics on the driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.manifest import VideoRecord
from ardiff.errors import DataError
from ardiff.metrics.extractors import Extractor
from ardiff.metrics.pairs import PairMeasure, resampled_mean
from ardiff.metrics.protocol import VERSION, MetricName, Protocol, Recipe, recipe
from ardiff.metrics.scores import SetScore
from ardiff.metrics.store import FeatureStore, StoredClip
from ardiff.metrics.uncertainty import (
    Videos,
    centred_interval,
    distance_at_infinity,
    floor_halves,
    resampled_distance,
    set_distance,
    subset_distance,
    subset_sizes,
)
from ardiff.metrics.weights import State, cache_folder
from ray_jobs.evaluation.datasets import Listed, codecs, common_size, fake_clips, paired_clips, real_clips
from ray_jobs.evaluation.features import Clip, ClipSet, Extracted, Measure, Workers, extract
from ray_jobs.runtime.cluster import resolve_device
from ray_jobs.runtime.progress import progress_bar

if TYPE_CHECKING:
    from ray_jobs.evaluate import EvaluateConfig

Weights = dict[str, tuple[State, str]]
Opened = list[tuple[Listed, list[VideoRecord]]]
LEAST_FOR_INFINITY = 8
"""Clips from which on a line over 1/N is drawn."""
SUBSETS = 3
"""Draws of each size for that line."""


def score_sets(
    config: EvaluateConfig,
    metric: MetricName,
    weights: Weights,
    real: Listed,
    originals: list[VideoRecord],
    fakes: Opened,
) -> list[SetScore]:
    """One score for each set of generated videos. Raises ArdiffError."""
    how = recipe(config.protocol, metric)
    sides = [fake_clips(fake, records, config.num_clips, config.num_frames) for fake, records in fakes]
    resolution = common_size(originals + [r for _, records in fakes for r in records], config.resolution)
    extraction = Extraction(config, how, *weights[how.network])
    clips = reference_clips(config, originals)
    real_side, *fake_sides = extraction(clips, sides)
    base = Reference.of(config, how, clips, (shared(real_side[0]), real_side[1]))
    reference = base.features
    scores = []
    for (fake, records), (stored, found) in zip(fakes, fake_sides, strict=True):
        features = shared(stored)
        protocol = Protocol(
            name=config.protocol,
            metric=metric,
            network=how.network,
            weights=extraction.sha256,
            feature=how.feature,
            num_frames=config.num_frames,
            stride=config.stride,
            fps=config.fps,
            resolution=resolution,
            resize=f"{how.resize} to {how.size}x{how.size}",
            value_range=how.value_range,
            codec_real=_codec(originals, how),
            codec_fake=_codec(records, how),
            num_real=len(base.clips),
            num_fake=len(features),
            ddof=how.ddof,
            real_split=real.split(config.split),
            real_data=_data(base.rows),
        )
        value = set_distance(reference, features, how.distance, how.ddof)
        low, high, infinity = _uncertainty(config, f"{metric} of {fake.name}", reference, features, how, value)
        scores.append(
            SetScore(
                set=fake.name,
                metric=metric,
                score=value,
                floor=base.floor,
                floor_num=base.floor_num,
                low=low,
                high=high,
                infinity=infinity,
                fake=fake.uri,
                fake_data=_data(found),
                protocol=protocol,
            )
        )
    return scores


class Extraction:
    """Extracts by one recipe: features of real clips into the cache, of generated ones into the output folder."""

    def __init__(self, config: EvaluateConfig, how: Recipe, state: State, sha256: str) -> None:
        self.config, self.how, self.sha256 = config, how, sha256
        self.state = ray.put(state)

    def __call__(self, real: list[Clip], fakes: list[list[Clip]]) -> list[Extracted]:
        """Features and rows of the real clips, then of each set; kept by recipe, weights and data."""
        kept = self.config.cache or str(cache_folder())
        sets = [self._set(kept, real), *(self._set(self.config.output, clips) for clips in fakes)]
        build = functools.partial(_extractor, self.how, self.state)
        config = self.config
        return extract(self.how.network, sets, build, config.num_frames, config.resolution, workers(config))

    def _set(self, root: str, clips: list[Clip]) -> ClipSet:
        how, config = self.how, self.config
        seen = (how.network, how.pool_frames, how.size, how.resize, how.value_range, how.reencode)
        key = fingerprint([*seen, self.sha256, config.num_frames, config.resolution, VERSION], stamps(clips))
        return ClipSet(clips, FeatureStore(storage.join(root, "features", f"{how.network}-{key}")))


def _extractor(how: Recipe, state: Any, device: torch.device) -> Measure:
    return Extractor(how, ray.get(state), device)


def workers(config: EvaluateConfig) -> Workers:
    """What the configuration gives the extraction to run on."""
    return Workers(
        device=resolve_device(config.device),
        batch_size=config.batch_size,
        max_actors=config.max_actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )


def stamps(clips: list[Clip]) -> list[list[Any]]:
    """What names the data of clips without reading it: place, start, stride, rate, and the videos' sizes and changes.

    What the records say of that counts; files of which they do not say it are looked at. Raises DataError if one of
    them is gone.
    """
    videos = {side.uri: side for clip in clips for side in (clip.video, clip.original) if side is not None}
    known: dict[str, list[Any]] = {uri: [video.size, video.etag] for uri, video in videos.items()}
    uris = sorted(uri for uri, video in videos.items() if not video.etag)
    for remote in (True, False):
        mine = [uri for uri in uris if storage.is_remote(uri) == remote]
        if mine:
            filesystem, _ = storage.open_filesystem(mine[0])
            paths = [uri.partition("://")[2] if remote else uri for uri in mine]
            for uri, info in zip(mine, filesystem.get_file_info(paths), strict=True):
                if not info.is_file:
                    raise DataError(f"There is no video {uri} any more: list the videos again.")
                known[uri] = [info.size, info.mtime_ns or 0]
    sides = [[None if side is None else [side.uri, *known[side.uri]] for side in (c.video, c.original)] for c in clips]
    rates = [[clip.fps] if clip.fps else [] for clip in clips]
    return [[c.start, c.stride, *rate, *names] for c, rate, names in zip(clips, rates, sides, strict=True)]


@dataclass(frozen=True, slots=True)
class Reference:
    """The real clips that sets are compared with."""

    clips: list[Clip]
    features: Videos
    rows: list[StoredClip]
    floor: float | None
    """The distance between two sets of real clips; None if there are fewer than four real videos."""
    floor_num: int | None
    """Clips on each side of the floor."""

    @classmethod
    def of(cls, config: EvaluateConfig, how: Recipe, clips: list[Clip], extracted: Extracted) -> Reference:
        """The reference and its floor, from the features of :func:`reference_clips`.

        With twice as many real videos as clips the floor is at the score's own N; with fewer, the reference is cut into
        halves that share no video.
        """
        count, (features, rows) = config.num_clips, extracted
        if len(clips) == 2 * count:
            left, right = list(range(count)), list(range(count, 2 * count))
        else:
            left, right = floor_halves([clip.video.uri for clip in clips])
        floor = None
        if len(left) >= 2:
            floor = set_distance(features[left], features[right], how.distance, how.ddof)
        return cls(clips[:count], features[:count], rows[:count], floor, None if floor is None else len(left))


def reference_clips(config: EvaluateConfig, originals: list[VideoRecord]) -> list[Clip]:
    """The real clips, and as many again of other videos for the floor, if there are enough."""
    count = config.num_clips * (2 if len(originals) >= 2 * config.num_clips else 1)
    return real_clips(originals, count, config.span, config.stride, config.seed, config.fps)


def shared(videos: Videos) -> Videos:
    """The same videos in Ray's object store, which moves to disk what it has no room for, block by block."""
    return Videos.of(functools.partial(_fetched, [ray.put(block) for block in videos]), len(videos))


def _fetched(blocks: list[Any]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield ray.get(block)


def _uncertainty(
    config: EvaluateConfig, what: str, real: Videos, fake: Videos, how: Recipe, value: float
) -> tuple[float | None, float | None, float | None]:
    """The interval's ends and the distance at infinity, each None where it is not asked for or cannot be had."""
    kind, sides = (how.distance, how.ddof, config.seed), (ray.put(real), ray.put(fake))
    calls: list[tuple[Callable[..., float], tuple[Any, ...]]] = []
    calls += [(resampled_distance, (*kind, i)) for i in range(config.bootstrap)]
    sizes: list[int] = []
    if how.distance == "frechet" and len(real) >= LEAST_FOR_INFINITY:
        sizes = [size for size in subset_sizes(len(real)) for _ in range(SUBSETS)]
        calls += [(subset_distance, (*kind, size, i)) for i, size in enumerate(sizes)]
    values = _in_parallel(what, sides, calls)
    resampled, subsets = values[: config.bootstrap], values[config.bootstrap :]
    low, high = centred_interval(value, resampled) if resampled else (None, None)
    return low, high, distance_at_infinity(sizes, subsets) if sizes else None


def _in_parallel(
    what: str, sides: tuple[Any, Any], calls: list[tuple[Callable[..., float], tuple[Any, ...]]]
) -> list[float]:
    """``function(real, fake, *arguments)`` of every call as a task of the cluster, in the order of the calls."""
    tasks = [ray.remote(function).remote(*sides, *arguments) for function, arguments in calls]
    with progress_bar(f"interval: {what}", len(tasks), "resample") as bar:
        waiting: list[Any] = list(tasks)
        while waiting:
            _, waiting = ray.wait(waiting, timeout=1.0, num_returns=len(waiting))
            bar.update(len(tasks) - len(waiting))
    values: list[float] = ray.get(tasks)
    return values


def score_pairs(
    config: EvaluateConfig,
    metrics: list[MetricName],
    weights: Weights,
    real: Listed,
    originals: list[VideoRecord],
    fakes: Opened,
) -> list[SetScore]:
    """One score per metric for each set of videos, compared with their originals frame by frame. Raises ArdiffError."""
    state, sha256 = weights.get("lpips-alex", (None, ""))
    lpips = ray.put(state)
    sets, resolutions = [], []
    for fake, records in fakes:
        clips = fake_clips(fake, records, config.num_clips, config.num_frames)
        pairs = paired_clips(fake, clips, real, originals)
        used = {pair.original.uri: pair.original for pair in pairs if pair.original is not None}
        resolutions.append(common_size([*records, *used.values()], config.resolution))
        key = fingerprint([sha256, config.num_frames, config.resolution, VERSION], stamps(pairs))
        sets.append(ClipSet(pairs, FeatureStore(storage.join(config.output, "features", f"pairs-{key}"))))
    build = functools.partial(_pair_measure, lpips)
    extracted = extract("pairs", sets, build, config.num_frames, config.resolution, workers(config))
    scores = []
    for (fake, records), resolution, (stored, rows) in zip(fakes, resolutions, extracted, strict=True):
        values = stored.array()
        for metric in metrics:
            of_clips = values[:, 0, PairMeasure.COLUMNS.index(metric)]  # (V,)
            value = float(of_clips.mean(dtype=np.float64))
            resampled = [resampled_mean(of_clips, config.seed, i) for i in range(config.bootstrap)]
            low, high = centred_interval(value, resampled) if resampled else (None, None)
            protocol = Protocol(
                name="paired",
                metric=metric,
                network="lpips-alex" if metric == "lpips" else "none",
                weights=sha256 if metric == "lpips" else "none",
                feature="mean over frames, then over videos",
                num_frames=config.num_frames,
                stride=1,
                resolution=resolution,
                resize="none",
                value_range="0 to 255" if metric != "lpips" else "[-1, 1]",
                codec_real=codecs(originals),
                codec_fake=codecs(records),
                num_real=len(rows),
                num_fake=len(rows),
                ddof=0,
                real_split=real.split(config.split),
                real_data=_data(rows, side=0),
            )
            scores.append(
                SetScore(
                    set=fake.name,
                    metric=metric,
                    score=value,
                    floor=None,
                    floor_num=None,
                    low=low,
                    high=high,
                    infinity=None,
                    fake=fake.uri,
                    fake_data=_data(rows),
                    protocol=protocol,
                )
            )
    return scores


def _pair_measure(state: Any, device: torch.device) -> Measure:
    return PairMeasure(ray.get(state), device)


def _data(rows: list[StoredClip], side: int = -1) -> str:
    """Names clips by their pixels and where they start; of pairs, one side of them."""
    return fingerprint([[row.sha256.split(":")[side], row.start] for row in rows])


def _codec(records: list[VideoRecord], how: Recipe) -> str:
    return f"{codecs(records)}, then mpeg4 at 25 fps" if how.reencode else codecs(records)
