"""Predicts how real videos go on: a pipeline is given the first frames of each, and baselines are too.

Writes a folder of array files for each set: `real` with the true frames, `model`, `last-frame` and `constant-velocity`.
`ardiff evaluate` scores them. An interrupted run resumes with the missing videos.

    ardiff predict --pipeline runs/moving_mnist/dit/pipeline --manifest runs/moving_mnist/data/manifest.parquet
"""

import io
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import ray.data
import torch

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.clips import read_clip
from ardiff.data.encode import contact_sheet
from ardiff.data.manifest import Split, VideoRecord, read_manifest, record_of, usable
from ardiff.errors import ConfigError
from ardiff.metrics.arrays import read_array_clip
from ardiff.metrics.predictors import BASELINES
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.params import FROM_INPUT, SamplingParams, validate
from ardiff.sweep.models import SweptModel
from ray_jobs.runtime.cluster import ray_cluster, resolve_device
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.runtime.stages import claim_output, record_run, stage

POSITIONALS = ("pipeline", "output")
REAL, MODEL = "real", "model"
"""The sets of true and of predicted frames."""
SHEET_VIDEOS = 4
"""Videos on the contact sheet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(SamplingParams):
    """Settings of `ardiff predict`, beside the sampling parameters."""

    pipeline: str = "runs/dit/pipeline"
    """Folder of the trained pipeline, local or s3://."""
    manifest: str = "runs/data/manifest.parquet"
    """Manifest of the real videos."""
    split: Split = "test"
    """Split of the manifest: test or train."""
    output: str = "runs/predictions"
    """Folder of the sets."""
    num_given: int = 10
    """First frames of each video, which are given. The model predicts those up to ``num_frames``."""
    num_videos: int = 256
    """Videos, the first ones of the split; seeds count up from ``seed``."""
    batch_size: int = 16
    """Videos that one actor predicts together, and videos in a file."""
    max_actors: int = 1
    """Predicting actors; on a GPU cluster each takes one GPU."""
    cpu_threads: int = 1
    """Threads of an actor, and the CPUs that it reserves in Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs if the cluster has any."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Limits and backends of the sampling engine."""

    def __post_init__(self) -> None:
        if min(self.num_videos, self.batch_size, self.max_actors, self.cpu_threads) < 1:
            raise ValueError("num_videos, batch_size, max_actors and cpu_threads must be at least 1")
        if not 2 <= self.num_given < self.num_frames:
            raise ValueError(f"num_given must be 2 or more and below num_frames ({self.num_frames})")
        if names := (set(FROM_INPUT) | {"prompt", "conditions"}) & self.params.changed().keys():
            raise ValueError(f"{', '.join(sorted(names))} cannot be set: the given frames are the condition")


def run(config: PredictConfig, key: str = "") -> None:
    """Writes the missing predictions. Raises ArdiffError before any work if the model cannot make them."""
    model = SweptModel.load(config.pipeline)
    try:
        params = validate(replace(config.params, given_frames=config.num_given), model.info)
    except ValueError as error:
        raise ConfigError(f"{config.pipeline} cannot predict these videos: {error}.") from error
    records = usable(read_manifest(config.manifest), config.split, config.num_frames)
    if len(records) < config.num_videos:
        raise ConfigError(
            f"{config.manifest} has {len(records)} videos of {config.num_frames} frames in the split {config.split}, "
            f"but num_videos is {config.num_videos}: lower it."
        )
    records = records[: config.num_videos]
    with ray_cluster(), stage("predict", config.output, key) as run_record:
        data = [(record.uri, record.size, record.version) for record in records]
        claim_output(config.output, fingerprint(model.weights, params.changed(), config.batch_size, data))
        record_run(config.output, config)
        _predict(config, records)
        _write_sheet(config)
        run_record.note = (
            f"{len(records)} videos, {config.num_given} frames given, {config.num_frames - config.num_given} predicted"
        )


def _predict(config: PredictConfig, records: list[VideoRecord]) -> None:
    """Predicts the batches whose files are not complete."""
    batches: list[dict[str, Any]] = [
        {"first": first, "records": [asdict(record) for record in records[first : first + config.batch_size]]}
        for first in range(0, len(records), config.batch_size)
    ]
    missing = [batch for batch in batches if not _is_complete(config, batch["first"])]
    if not missing:
        return
    device = resolve_device(config.device)
    with remote_progress("predicting", len(records), "video") as progress:
        progress.add.remote(sum(len(b["records"]) for b in batches) - sum(len(b["records"]) for b in missing))
        ray.data.from_items(missing, override_num_blocks=len(missing)).flat_map(
            Predictor,
            fn_constructor_args=(config, device.type, progress),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
            num_cpus=config.cpu_threads,
            num_gpus=1 if device.type == "cuda" else 0,
        ).take_all()


class Predictor:
    """An actor that predicts batches of videos and writes all sets of each."""

    def __init__(self, config: PredictConfig, device: str, progress: Any) -> None:
        torch.set_num_threads(config.cpu_threads)
        self.config, self.progress = config, progress
        self.pipeline = ARDiffusionPipeline.from_pretrained(
            config.pipeline, torch.device(device), torch.float32, config.engine
        )

    def __call__(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        config, first = self.config, int(batch["first"])
        with report_errors(self.progress):
            records = [record_of(row) for row in batch["records"]]
            shape = self.pipeline.info.shape_of(config.params)
            videos = np.stack([read_clip(r, 0, config.num_frames, 1, shape) for r in records])  # (B, F, H, W, 3)
            given, true = np.split(videos, [config.num_given], axis=1)
            labels = [r.label for r in records] if self.pipeline.info.num_classes else None
            predicted = self.pipeline(
                config.params,
                condition=torch.from_numpy(given.copy()),
                class_label=labels,
                seed=[config.seed + first + i for i in range(len(records))],
            ).frames.numpy()[:, config.num_given :]
            for name, baseline in BASELINES.items():
                _write(config, name, first, np.stack([baseline(video, true.shape[1]) for video in given]))
            _write(config, MODEL, first, predicted)
            _write(config, REAL, first, true)  # last: it marks the batch as complete
        self.progress.add.remote(len(records))
        return [{"first": first}]


def _file(config: PredictConfig, name: str, first: int) -> str:
    """The file with the videos of a set from number ``first`` on."""
    return storage.join(storage.absolute(config.output), name, f"{first:06d}.npy")


def _write(config: PredictConfig, name: str, first: int, videos: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, videos, allow_pickle=False)
    storage.write_bytes(_file(config, name, first), buffer.getvalue())


def _is_complete(config: PredictConfig, first: int) -> bool:
    return storage.exists(_file(config, REAL, first))


def _write_sheet(config: PredictConfig) -> None:
    """Writes the true frames of the first videos, and below them what each set predicts."""
    sets, count = (REAL, MODEL, *BASELINES), config.num_frames - config.num_given
    numbers = range(min(SHEET_VIDEOS, config.batch_size, config.num_videos))
    rows = [
        (f"{number} {name}", read_array_clip(f"{_file(config, name, 0)}#/{number:06d}", range(count)))
        for number in numbers
        for name in sets
    ]
    sheet = contact_sheet(np.stack([clip for _, clip in rows]), [label for label, _ in rows], scale=1)
    storage.write_bytes(storage.join(config.output, "sheet.png"), sheet)


if __name__ == "__main__":
    raise SystemExit(main(["predict", *sys.argv[1:]]))
