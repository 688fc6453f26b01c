"""Scores of generated videos against their originals: actors measure each pair."""

import functools
from dataclasses import asdict

import torch

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.latents import vae_fingerprint
from ardiff.metrics.paired import PairMeasure
from ardiff.metrics.protocol import VERSION, Protocol
from ardiff.metrics.registry import PairedMetric, State
from ardiff.metrics.scores import SetScore
from ardiff.metrics.store import FeatureStore
from ardiff.metrics.uncertainty import mean_with_interval
from ray_jobs.evaluation.datasets import codecs, common_size, paired_clips, real_clips
from ray_jobs.evaluation.estimates import data_fingerprint
from ray_jobs.evaluation.features import ClipSet, Measure, Workers, data_keys, extract, read_stored
from ray_jobs.evaluation.set_metrics import Inputs, evaluation_sets, shared


def score_pairs(inputs: Inputs, metrics: list[PairedMetric]) -> list[SetScore]:
    """One score per metric for each set of videos: the mean over videos. Raises ArdiffError."""
    config = inputs.config
    weights = {m.network.name: inputs.weights[m.network.name] for m in metrics if m.network is not None}
    settings = [[m.name for m in metrics], {name: sha256 for name, (_, sha256) in weights.items()}]
    real = real_clips(inputs.real.records, min(config.num_clips, len(inputs.real.records)), config)
    scored, clip_sets, resolutions = evaluation_sets(inputs, real), [], []
    for own in scored:
        pairs = own.clips if own.vae else paired_clips(own.uri, own.clips, inputs.real)
        records = [side for clip in pairs for side in (clip.video, clip.original) if side is not None]
        resolutions.append(common_size(records, config.resolution))
        vae = [vae_fingerprint(own.vae)] if own.vae else []
        key = fingerprint([*settings, config.num_frames, config.resolution, VERSION, *vae], data_keys(pairs))
        store = FeatureStore(storage.join(config.output, "features", f"pairs-{key}"))
        clip_sets.append(ClipSet(pairs, store, own.vae, against_original=bool(own.vae)))
    build = functools.partial(_build_measure, metrics, shared({name: state for name, (state, _) in weights.items()}))
    extracted = read_stored(clip_sets)
    if extracted is None:
        inputs.join_cluster()
        extracted = extract("pairs", clip_sets, build, config.num_frames, config.resolution, Workers.of(config))
    scores = []
    for own, resolution, (stored, rows) in zip(scored, resolutions, extracted, strict=True):
        values = stored.array()[:, 0]  # (V, M)
        for index, metric in enumerate(metrics):
            score, uncertainty = mean_with_interval(values[:, index])
            network = "none" if metric.network is None else metric.network.name
            protocol = Protocol(
                name="paired",
                metric=metric.name,
                network=network,
                weights=weights[network][1] if network in weights else "none",
                feature="mean over frames, then over videos",
                num_frames=config.num_frames,
                stride=1,
                resolution=resolution,
                resize="none",
                value_range=metric.value_range,
                codec_real=codecs(inputs.real.records),
                codec_fake=own.codec,
                num_real=len(rows),
                num_fake=len(rows),
                ddof=0,
                real_split=inputs.real.dataset.split_name(config.split),
                real_data=data_fingerprint(rows, side=0),
                choice=config.choice,
                fit=config.fit if config.resolution or own.vae else "whole",
            )
            scores.append(
                SetScore(
                    set=own.name,
                    metric=metric.name,
                    score=score,
                    baseline=None,
                    baseline_num=None,
                    **asdict(uncertainty),
                    fake=own.uri,
                    fake_data=data_fingerprint(rows),
                    protocol=protocol,
                )
            )
    return scores


def _build_measure(metrics: list[PairedMetric], states: dict[str, State], device: torch.device) -> Measure:
    return PairMeasure(metrics, states, device)
