"""Scores sets of generated videos against real ones by a published protocol, on Ray Data.

A set is a manifest, or a folder or S3 prefix of videos. The features of the real videos are kept for later evaluations.

    python -m ray_jobs.evaluate --real data/manifest.parquet --fake runs/videos --metrics fvd,kvd --num-clips 256
"""

import contextlib
import functools
import sys
from typing import Any

from rich.markup import escape

from ardiff.cli import main
from ardiff.config import to_yaml
from ardiff.data.manifest import usable
from ardiff.errors import ConfigError
from ardiff.metrics.scores import SetScore, table, write_scores
from ardiff.metrics.weights import find_state
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.evaluation.datasets import (
    Dataset,
    OpenDataset,
    ProbeCache,
    check_count,
    codecs,
    list_videos,
    open_generated,
    open_videos,
)
from ray_jobs.evaluation.drift import measure_drift
from ray_jobs.evaluation.paired_metrics import score_pairs
from ray_jobs.evaluation.precomputed import score_features, set_name
from ray_jobs.evaluation.reconstruction import NAME as RECONSTRUCTION
from ray_jobs.evaluation.set_metrics import Inputs, Weights, score_sets
from ray_jobs.reports.drift import write_drift
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import record_run, stage, versions

ALIASES = {"num_frames": "frames"}


def run(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Writes the scores, and returns the content of ``scores.json``.

    Raises:
        ArdiffError: There are no usable videos or too few, or weights are missing. All checks that need no open video
            come before Ray starts.
    """
    if config.features:
        return _score_features(config, key)
    datasets = [list_videos(uri) for uri in config.fake]
    names = [dataset.name for dataset in datasets] + ([RECONSTRUCTION] if config.reconstruct is not None else [])
    if not names:
        raise ConfigError(
            "There is nothing to score: give --fake, a manifest or folder of generated videos, --reconstruct or "
            "--features."
        )
    _check_names(names, "keep generated videos in folders of different names")
    real, weights = check(config)
    for dataset in datasets:
        check_count(dataset, config.num_clips)
    train = None if config.train is None else list_videos(config.train)
    with contextlib.ExitStack() as cluster, stage("evaluate", config.output, key) as record:
        join_cluster = functools.cache(lambda: cluster.enter_context(ray_cluster()))
        record_run(config.output, config)
        cache, filters = ProbeCache(config.cache_uri, join_cluster), (config.deinterlace, config.tone_map)
        open_real = open_videos(real, config.split, config.span, config.fps, cache, filters)
        generated = [open_generated(dataset, config.num_frames, cache) for dataset in datasets]
        open_train = None if train is None else open_videos(train, "train", config.span, config.fps, cache, filters)
        for open_set in generated:
            _warn_of_codecs(config, open_real, open_set)
        inputs = Inputs(config, weights, open_real, generated, open_train, join_cluster)
        scores: list[SetScore] = []
        for name, spec in config.set_metrics.items():
            scores += score_sets(inputs, name, spec)
        if config.paired_metrics:
            scores += score_pairs(inputs, config.paired_metrics)
        content = write_scores(config.output, scores, versions())
        if config.drift:
            write_drift(measure_drift(inputs), config.output, to_yaml(config))
        record.results, record.note = content, f"{len(scores)} scores of {len({score.set for score in scores})} sets"
        print_line(escape(table([(score.set, score) for score in scores])))
    return content


def _score_features(config: EvaluateConfig, key: str) -> dict[str, Any]:
    """Scores features of files, without a cluster."""
    _check_names([set_name(uri) for uri in config.features], "give files of different names")
    with stage("evaluate", config.output, key) as record:
        record_run(config.output, config)
        scores = score_features(config)
        content = write_scores(config.output, scores, versions())
        record.results, record.note = content, f"{len(scores)} scores of {len(config.features)} sets"
        print_line(escape(table([(score.set, score) for score in scores])))
    return content


def check(config: EvaluateConfig) -> tuple[Dataset, Weights]:
    """The list of real videos and the weights of all networks.

    Raises:
        ArdiffError: There are no usable real videos, or weights are missing.
    """
    real = list_videos(config.real)
    if real.records is not None:
        usable(real.records, config.split, config.span, config.fps)
    return real, {name: find_state(name, config.weights) for name in config.networks}


def _check_names(names: list[str], advice: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two sets are called '{name}': {advice}.")


def _warn_of_codecs(config: EvaluateConfig, real: OpenDataset, generated: OpenDataset) -> None:
    """Warns if the codecs differ: that changes a distance more than most models differ."""
    reencoded = not config.paired_metrics and all(spec.reencode for spec in config.set_metrics.values())
    if codecs(real.records) != codecs(generated.records) and not reencoded:
        print_line(
            f"[yellow]note[/] the codec of the real videos is {codecs(real.records)}, that of {escape(generated.name)} "
            f"is {codecs(generated.records)}: a difference in compression raises distances. Store both in the same way."
        )


if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
