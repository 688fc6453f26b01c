"""Trains the AR-VAE on clips that Ray Data decodes.

python -m ray_jobs.train_vae --config configs/quickstart/train_vae.yaml train.num_steps=500
"""

import functools
import sys
from dataclasses import replace

import numpy as np
import torch

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data.bucket_stream import clip_stream
from ardiff.data.buckets import choose, training_videos
from ardiff.data.manifest import VideoRecord, content_of, manifest_table, read_manifest
from ardiff.data.streams import Stream
from ardiff.errors import ConfigError
from ardiff.models import make_autoencoder
from ardiff.randomness import derive_seed
from ardiff.train.export import describe_autoencoder
from ardiff.train.initial import initialise_autoencoder
from ardiff.train.tasks import AutoencoderTask
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.error_log import training_error_log
from ray_jobs.runtime.stages import record_run, stage
from ray_jobs.training.config import TrainVAEConfig
from ray_jobs.training.job import TrainJob, loss_note
from ray_jobs.training.trainer import run_training


def run(config: TrainVAEConfig, key: str = "") -> None:
    """Trains to the end; resumes an interrupted run of the same configuration. Raises ArdiffError."""
    manifest, clips = read_manifest(config.clips.manifest), config.clips
    records = training_videos(manifest, clips)
    config = with_buckets(config, records)
    with (
        ray_cluster(config.train.num_workers * config.train.cpu_threads + 2),
        training_error_log(config.output, clips, manifest, records, config.resume) as report,
    ):
        shapes, order = config.vae.shapes, (config.train.seed, config.train.batch_size)
        stream = clip_stream(manifest_table(records), clips, shapes, *order, report)
        job = TrainJob(
            name="AR-VAE",
            folder=config.output,
            fingerprint=fingerprint(
                config.vae,
                config.task,
                clips.resume_key,
                content_of(records),
                config.init_from,
                config.train.resume_key,
            ),
            config=config.train,
            stream=stream,
            make_task=functools.partial(make_task, config, stream),
            record=functools.partial(record_run, config.output, config),
            description=describe_autoencoder(config.vae),
            result=config.model,
            resume=config.resume,
        )
        with stage("train-vae", config.output, key) as record:
            history = run_training(job)
            record.note = loss_note(history)
            record.results = {"history": history}


def with_buckets(config: TrainVAEConfig, records: list[VideoRecord]) -> TrainVAEConfig:
    """The configuration whose AR-VAE knows the shapes of ``clips``. Raises ConfigError."""
    clips, buckets = config.clips, config.clips.buckets
    if clips.auto_buckets:
        heights, widths = (np.array(sides) for sides in zip(*((r.height, r.width) for r in records), strict=True))
        first, patch_size = config.vae.resolution, config.vae.patch_size
        buckets = choose(heights, widths, first, clips.auto_buckets, patch_size)
        print_line(f"Shapes: {', '.join(map(str, (first, *buckets)))} (height x width)")
    if config.vae.buckets not in ((), buckets):
        raise ConfigError("vae.buckets follows from clips.buckets: leave it out.")
    try:
        return replace(config, vae=replace(config.vae, buckets=buckets))
    except ValueError as error:
        raise ConfigError(f"clips.buckets: {error}.") from error


def make_task(config: TrainVAEConfig, stream: Stream) -> AutoencoderTask:
    """The task with initial weights from the seed or ``init_from``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("initial weights", config.train.seed))
        task = AutoencoderTask(make_autoencoder(config.vae), config.task)
    if config.init_from:
        initialise_autoencoder(config.init_from, task.model, task.discriminator)
    if config.clips.lengths:
        task.lengths = config.clips.all_lengths
    if config.train.sample_every:
        task.examples = torch.from_numpy(stream.load(0)["video"][:4])
    return task


if __name__ == "__main__":
    raise SystemExit(main(["train-vae", *sys.argv[1:]]))
