"""Trains the AR-VAE on clips decoded by Ray Data.

python -m ray_jobs.train_vae --config configs/quickstart/train_vae.yaml train.num_steps=500
"""

import functools
import sys
from dataclasses import dataclass, field

import torch

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.config import ClipConfig
from ardiff.data.manifest import content_of, manifest_table, read_manifest, usable
from ardiff.data.streams import ClipStream
from ardiff.randomness import derive_seed
from ardiff.train.config import TrainConfig
from ardiff.train.export import describe_autoencoder
from ardiff.train.initial import initialise_autoencoder
from ardiff.train.tasks import AutoencoderTask, AutoencoderTaskConfig
from ardiff.vae import ARAutoencoder, AutoencoderConfig
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.error_log import training_error_log
from ray_jobs.runtime.stages import record_run, stage
from ray_jobs.training.job import TrainJob, loss_note, run_training


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainVAEConfig:
    """One run of AR-VAE training."""

    output: str = "runs/vae"
    """Folder of the run; the trained model is put into ``model`` below it."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """The data."""
    init_from: str = ""
    """Where the weights of an earlier stage lie: an AR-VAE folder, a pipeline folder or a training checkpoint (which
    also has the discriminator), local or ``s3://``. Wider latents are pruned to ``vae.token_dim``. Empty starts from
    random weights."""
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """The model."""
    task: AutoencoderTaskConfig = field(default_factory=AutoencoderTaskConfig)
    """The losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    resume: str = "auto"
    """Where to begin. ``auto``: at the last checkpoint in the output folder, or afresh if there is none. ``latest``: at
    the last checkpoint, which must be there. ``none``: afresh; earlier checkpoints of the output folder are deleted.
    Else the place of a checkpoint of another run, used as long as the output folder has none of its own; learning
    rates, schedule and other numbers of the optimisation may differ from that run's, the rest may not."""

    @property
    def model(self) -> str:
        """Where the trained AR-VAE is written."""
        return storage.join(self.output, "model")


def run(config: TrainVAEConfig, key: str = "") -> None:
    """Trains to the end, or goes on where an interrupted run of the same configuration stopped. Raises ArdiffError."""
    manifest, clips = read_manifest(config.clips.manifest), config.clips
    records = usable(manifest, "train", clips.span, clips.fps)
    with (
        ray_cluster(config.train.num_workers * config.train.cpu_threads + 2),
        training_error_log(config.output, clips, manifest, records, config.resume) as bad,
    ):
        videos, seed = manifest_table(records), config.train.seed
        stream = ClipStream(videos, config.clips, config.vae.resolution, seed, report=bad)
        job = TrainJob(
            name="AR-VAE",
            folder=config.output,
            fingerprint=fingerprint(
                config.vae,
                config.task,
                config.clips.resume_key,
                content_of(records),
                config.init_from,
                config.train.resume_key,
            ),
            config=config.train,
            stream=stream,
            make_task=functools.partial(_make_task, config, stream),
            record=functools.partial(record_run, config.output, config),
            description=describe_autoencoder(config.vae),
            result=config.model,
            resume=config.resume,
        )
        with stage("train-vae", config.output, key) as record:
            history = run_training(job)
            record.note = loss_note(history)
            record.results = {"history": history}


def _make_task(config: TrainVAEConfig, stream: ClipStream) -> AutoencoderTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("initial weights", config.train.seed))
        task = AutoencoderTask(ARAutoencoder(config.vae), config.task)
    if config.init_from:
        initialise_autoencoder(config.init_from, task.model, task.discriminator)
    if config.train.sample_every:
        task.examples = torch.from_numpy(stream.load(0)["video"][:4])
    return task


if __name__ == "__main__":
    raise SystemExit(main(["train-vae", *sys.argv[1:]]))
