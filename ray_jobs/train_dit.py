"""Trains the AR-DiT on latents streamed by Ray Data, and puts it together with its AR-VAE into a pipeline.

python -m ray_jobs.train_dit --config configs/quickstart/train_dit.yaml train.optimizer.lr=1e-4
"""

import functools
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ardiff.cli import main
from ardiff.config import fingerprint, later
from ardiff.data import storage
from ardiff.data.latents import LatentSet, read_description
from ardiff.data.streams import LatentStream
from ardiff.diffusion.process import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import ConfigError
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import derive_seed
from ardiff.train.export import describe_dit
from ardiff.train.initial import initialise_dit
from ardiff.train.loop import TrainConfig
from ardiff.train.tasks import DiTTask, DiTTaskConfig
from ray_jobs.common import ray_cluster, record_run, stage
from ray_jobs.train import TrainJob, loss_note, run_training


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDiTConfig:
    """One run of AR-DiT training."""

    output: str = "runs/dit"
    """Folder of the run; the trained pipeline is put into ``pipeline`` below it."""
    latents: str = "runs/latents"
    """Folder of latents: what ``ardiff encode`` printed, the one that holds ``latents.json``."""
    files_per_chunk: int = 16
    """Parquet files loaded and shuffled together."""
    init_from: str = later("")
    """Pipeline folder whose AR-DiT training begins with, local or ``s3://``. Empty starts from random weights."""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """The model."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The process."""
    task: DiTTaskConfig = field(default_factory=DiTTaskConfig)
    """The recipe."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    resume: str = "auto"
    """Where to begin. ``auto``: at the last checkpoint in the output folder, or afresh if there is none. ``latest``: at
    the last checkpoint, which must be there. ``none``: afresh; earlier checkpoints of the output folder are deleted.
    Else the place of a checkpoint, used as long as the output folder has none of its own."""

    def __post_init__(self) -> None:
        if self.files_per_chunk < 1:
            raise ValueError("files_per_chunk must be at least 1")

    @property
    def pipeline(self) -> str:
        """Where the trained pipeline is written."""
        return storage.join(self.output, "pipeline")


def run(config: TrainDiTConfig, key: str = "") -> None:
    """Trains to the end, or goes on where an interrupted run of the same configuration stopped. Raises ArdiffError."""
    latents = read_description(config.latents)
    _check(config, latents)
    with ray_cluster(config.train.num_workers * config.train.cpu_threads + 2):
        files = [storage.join(config.latents, file) for file in latents.files]
        shape = (latents.num_frames, latents.num_tokens, latents.token_dim)
        names = latents.class_names if config.dit.num_classes else []
        job = TrainJob(
            name="AR-DiT",
            folder=config.output,
            fingerprint=fingerprint(
                config.dit,
                config.diffusion,
                config.task,
                config.train.recipe,
                config.files_per_chunk,
                latents.fingerprint,
                *([config.init_from] if config.init_from else []),
            ),
            config=config.train,
            stream=LatentStream(files, latents.rows, shape, config.train.seed, config.files_per_chunk),
            make_task=functools.partial(_make_task, config, latents),
            record=functools.partial(record_run, config.output, config),
            description=describe_dit(config.dit, config.diffusion, latents.statistics, names, latents.vae),
            result=config.pipeline,
            resume=config.resume,
        )
        with stage("train-dit", config.output, key) as record:
            history = run_training(job)
            record.note = loss_note(history)
            record.results = {"history": history}


def _check(config: TrainDiTConfig, latents: LatentSet) -> None:
    """Raises ConfigError if model and latents do not fit, naming the keys."""
    pairs = {
        "dit.num_tokens": (config.dit.num_tokens, latents.num_tokens),
        "dit.token_dim": (config.dit.token_dim, latents.token_dim),
    }
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ConfigError(f"{key} is {ours}, but the latents in {config.latents} have {theirs}.")
    if config.dit.num_frames < latents.num_frames:
        raise ConfigError(
            f"dit.num_frames is {config.dit.num_frames}, but the latents in {config.latents} are clips of "
            f"{latents.num_frames} frames."
        )
    if config.dit.num_classes not in (0, len(latents.class_names)):
        raise ConfigError(
            f"dit.num_classes is {config.dit.num_classes}, but the latents in {config.latents} have "
            f"{len(latents.class_names)} classes (0 trains without classes)."
        )


def _make_task(config: TrainDiTConfig, latents: LatentSet) -> DiTTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("initial weights", config.train.seed))
        model = DiT(config.dit)
    if config.init_from:
        initialise_dit(config.init_from, model)
    decode = None
    if config.train.sample_every:
        vae = load_autoencoder(latents.vae)

        def decode(z: Tensor) -> Tensor:
            return vae.to(z.device).decode_long(z)

    return DiTTask(model, config.task, config.diffusion, latents.statistics, decode)


if __name__ == "__main__":
    raise SystemExit(main(["train-dit", *sys.argv[1:]]))
