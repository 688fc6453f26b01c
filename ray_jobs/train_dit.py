"""Trains the AR-DiT on latents or clips that Ray Data loads, and writes a pipeline of the AR-DiT and its AR-VAE.

python -m ray_jobs.train_dit --config configs/quickstart/train_dit.yaml train.optimizer.lr=1e-4
"""

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data.latents import LatentSet
from ardiff.data.manifest import read_manifest
from ardiff.dit.lora import add_lora
from ardiff.models import make_dit
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import derive_seed
from ardiff.resolution import Resolution
from ardiff.train.export import describe_dit
from ardiff.train.initial import initialise_dit
from ardiff.train.tasks import DiTTask
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.error_log import Reporter, training_error_log
from ray_jobs.runtime.stages import record_run, stage
from ray_jobs.training.config import TrainDiTConfig
from ray_jobs.training.dit_data import (
    check_sizes,
    clip_encoder,
    clip_statistics,
    latents_of_clips,
    make_stream,
    stored_latents,
    stored_texts,
    with_shapes,
)
from ray_jobs.training.job import TrainJob, loss_note
from ray_jobs.training.trainer import run_training


def run(config: TrainDiTConfig, key: str = "") -> None:
    """Trains to the end; resumes an interrupted run of the same configuration. Raises ArdiffError."""
    bad_samples: AbstractContextManager[Reporter | None]
    if config.data.source == "clips":
        manifest = read_manifest(config.data.clips.manifest)
        latents, records = latents_of_clips(config, manifest)
        bad_samples = training_error_log(config.output, config.data.clips, manifest, records, config.resume)
    else:
        latents, records, bad_samples = stored_latents(config), [], nullcontext()
    check_sizes(config, latents)
    config = with_shapes(config, latents)
    texts = stored_texts(config, latents)
    with ray_cluster(config.train.num_workers * config.train.cpu_threads + 2), bad_samples as report:
        stream, source = make_stream(config, latents, records, texts, report)
        if records and not load_autoencoder(config.data.vae).config.unit_latents:
            latents = replace(latents, statistics=clip_statistics(config, stream, source))
        class_names = latents.class_names if config.dit.num_classes else []
        job = TrainJob(
            name="AR-DiT",
            folder=config.output,
            fingerprint=fingerprint(
                config.dit,
                config.diffusion,
                config.task,
                config.train.resume_key,
                source,
                config.init_from,
                config.lora,
            ),
            config=config.train,
            stream=stream,
            make_task=functools.partial(make_task, config, latents),
            record=functools.partial(record_run, config.output, config),
            description=describe_dit(
                config.dit,
                config.diffusion,
                latents,
                class_names,
                None if texts is None else texts[1].encoder,
                config.lora,
                config.init_from,
            ),
            result=config.pipeline,
            resume=config.resume,
        )
        with stage("train-dit", config.output, key) as record:
            history = run_training(job)
            record.note = loss_note(history)
            record.results = {"history": history}


def make_task(config: TrainDiTConfig, latents: LatentSet) -> DiTTask:
    """The task with initial weights from the seed or ``init_from``, and with a new adapter if there is to be one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("initial weights", config.train.seed))
        model = make_dit(config.dit)
        if config.init_from:
            shapes = [Resolution.parse(shape) for shape in latents.shapes]
            initialise_dit(config.init_from, model, shapes, new_layers=not config.lora.rank)
        if config.lora.rank:
            add_lora(model, config.lora)
    decode = None
    if config.train.sample_every:
        vae = load_autoencoder(latents.vae)

        def decode(z: Tensor) -> Tensor:
            return vae.to(z.device).decode_long(z)

    encode = clip_encoder(config.data.vae) if config.data.source == "clips" else None
    task = DiTTask(model, config.task, config.diffusion, latents.statistics, decode, encode)
    if encode is not None and config.data.clips.lengths:
        task.lengths = config.data.clips.all_lengths
    return task


if __name__ == "__main__":
    raise SystemExit(main(["train-dit", *sys.argv[1:]]))
