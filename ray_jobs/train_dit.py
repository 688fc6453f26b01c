"""Trains the AR-DiT on latents or clips streamed by Ray Data, and puts it together with its AR-VAE into a pipeline.

python -m ray_jobs.train_dit --config configs/quickstart/train_dit.yaml train.optimizer.lr=1e-4
"""

import functools
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import ray.data
import torch
from torch import Tensor

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.config import ClipConfig
from ardiff.data.latents import (
    LatentSet,
    LatentStatistics,
    check_vae,
    latent_sums,
    read_description,
    statistics_of,
    vae_fingerprint,
)
from ardiff.data.manifest import VideoRecord, class_names, content_of, manifest_table, read_manifest, usable
from ardiff.data.streams import ClipStream, LatentStream, Stream
from ardiff.data.transforms import to_unit
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import ConfigError
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import derive_seed
from ardiff.train.config import TrainConfig
from ardiff.train.export import describe_dit
from ardiff.train.initial import initialise_dit
from ardiff.train.tasks import DiTTask, DiTTaskConfig
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.error_log import Reporter, training_error_log
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.runtime.stages import record_run, stage
from ray_jobs.training.batches import load_chunk
from ray_jobs.training.job import TrainJob, loss_note, run_training


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTDataConfig:
    """What training reads."""

    source: Literal["latents", "clips"] = "latents"
    """``latents``: what ``ardiff encode`` has stored. ``clips``: videos, encoded by the AR-VAE in every step; nothing
    is stored, and every epoch has other clips."""
    vae: str = ""
    """Folder of the AR-VAE that encodes the clips. With stored latents, they must be of this model; empty takes the one
    that made them."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Of the source ``clips``."""
    statistics_clips: int = 512
    """Clips that say how latents are normalised, the first ones of the order of training; of the source ``clips``."""

    def __post_init__(self) -> None:
        if self.source == "clips" and not self.vae:
            raise ValueError("source=clips needs vae, the folder of the AR-VAE that encodes them")
        if self.statistics_clips < 1:
            raise ValueError("statistics_clips must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDiTConfig:
    """One run of AR-DiT training."""

    output: str = "runs/dit"
    """Folder of the run; the trained pipeline is put into ``pipeline`` below it."""
    latents: str = "runs/latents"
    """Folder of latents: what ``ardiff encode`` printed, the one that holds ``latents.json``."""
    files_per_chunk: int = 16
    """Parquet files loaded and shuffled together."""
    init_from: str = ""
    """Pipeline folder whose AR-DiT training begins with, local or ``s3://``. Empty starts from random weights."""
    data: DiTDataConfig = field(default_factory=DiTDataConfig)
    """Stored latents or videos."""
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
    Else the place of a checkpoint of another run, used as long as the output folder has none of its own; learning
    rates, schedule and other numbers of the optimisation may differ from that run's, the rest may not."""

    def __post_init__(self) -> None:
        if self.files_per_chunk < 1:
            raise ValueError("files_per_chunk must be at least 1")

    @property
    def pipeline(self) -> str:
        """Where the trained pipeline is written."""
        return storage.join(self.output, "pipeline")


def run(config: TrainDiTConfig, key: str = "") -> None:
    """Trains to the end, or goes on where an interrupted run of the same configuration stopped. Raises ArdiffError."""
    manifest = read_manifest(config.data.clips.manifest) if config.data.source == "clips" else []
    latents, records = _of_clips(config, manifest) if config.data.source == "clips" else (_stored(config), [])
    _check(config, latents)
    accounts = training_error_log(config.output, config.data.clips, manifest, records, config.resume)
    with (
        ray_cluster(config.train.num_workers * config.train.cpu_threads + 2),
        accounts if records else nullcontext() as bad,
    ):
        stream, source = _stream(config, latents, records, bad)
        if records and not load_autoencoder(config.data.vae).config.unit_latents:
            latents = replace(latents, statistics=_statistics_of(config, stream, source))
        names = latents.class_names if config.dit.num_classes else []
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
            ),
            config=config.train,
            stream=stream,
            make_task=functools.partial(_make_task, config, latents),
            record=functools.partial(record_run, config.output, config),
            description=describe_dit(config.dit, config.diffusion, latents, names),
            result=config.pipeline,
            resume=config.resume,
        )
        with stage("train-dit", config.output, key) as record:
            history = run_training(job)
            record.note = loss_note(history)
            record.results = {"history": history}


def _stored(config: TrainDiTConfig) -> LatentSet:
    """The stored set, with the AR-VAE that the pipeline gets, which must be the one that made it."""
    latents = read_description(config.latents)
    vae = config.data.vae or latents.vae
    if config.data.vae or latents.vae_fingerprint:
        check_vae(config.latents, latents, vae)
    return replace(latents, vae=storage.absolute(vae))


def _of_clips(config: TrainDiTConfig, manifest: list[VideoRecord]) -> tuple[LatentSet, list[VideoRecord]]:
    """The description that latents of the videos would have, and the videos."""
    clips, vae = config.data.clips, load_autoencoder(config.data.vae).config
    records = usable(manifest, "train", clips.span, clips.fps)
    weights, place = vae_fingerprint(config.data.vae), storage.absolute(config.data.vae)
    unknown = LatentStatistics.neutral(vae.num_tokens, vae.token_dim)
    shape = (clips.num_frames, vae.num_tokens, vae.token_dim)
    return LatentSet(weights, *shape, class_names(manifest), [], [], unknown, place, weights), records


def _stream(
    config: TrainDiTConfig, latents: LatentSet, records: list[VideoRecord], bad: Reporter | None
) -> tuple[Stream, str]:
    """What feeds the training, and a name of all that decides which samples come in which order."""
    seed, clips = config.train.seed, config.data.clips
    if records:
        resolution = load_autoencoder(config.data.vae).config.resolution
        name = fingerprint(clips.resume_key, content_of(records), config.data.statistics_clips, latents.fingerprint)
        return ClipStream(manifest_table(records), clips, resolution, seed, report=bad), name
    files = [storage.join(config.latents, file) for file in latents.files]
    shape = (latents.num_frames, latents.num_tokens, latents.token_dim)
    name = fingerprint(config.files_per_chunk, latents.fingerprint, latents.content)
    return LatentStream(files, latents.rows, shape, seed, config.files_per_chunk), name


def _statistics_of(config: TrainDiTConfig, stream: Stream, source: str) -> LatentStatistics:
    """How the latents of the first clips are spread; kept in the run's folder, so that a resumed run has the same.

    ``source`` names what feeds the training: what was kept of another is computed again.
    """
    place, key = storage.join(config.output, "statistics.json"), fingerprint(source, config.train.seed)
    if config.resume != "none" and storage.exists(place):
        kept = json.loads(storage.read_bytes(place))
        if kept.pop("source", "") == key:
            return LatentStatistics(**kept)
    chunks = range(stream.locate(config.data.statistics_clips - 1)[0] + 1)
    with remote_progress("statistics", len(chunks), "chunk") as progress:

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            chunk = int(row["id"])
            places = np.arange(stream.start(chunk + 1) - stream.start(chunk))
            with report_errors(progress):
                samples = load_chunk(stream, chunk, places, progress, f"chunk {chunk}")
                latents = _encoder(config.data.vae)(torch.from_numpy(samples["video"]))
            progress.add.remote(1)
            return {"sums": latent_sums(latents.double().numpy())}

        rows = ray.data.range(len(chunks), override_num_blocks=len(chunks)).map(encode).take_all()
    statistics = statistics_of([row["sums"] for row in rows])
    storage.write_bytes(place, json.dumps({"source": key, **asdict(statistics)}).encode())
    return statistics


@functools.lru_cache(maxsize=1)
def _encoder(vae: str) -> Callable[[Tensor], Tensor]:
    """Encodes video uint8 ``(B, F, H, W, 3)`` to the mean of its latents, on the device where it is."""
    model = load_autoencoder(vae).requires_grad_(False)

    @torch.no_grad()
    def encode(video: Tensor) -> Tensor:
        return model.to(video.device).latents(to_unit(video)).float()

    return encode


def _check(config: TrainDiTConfig, latents: LatentSet) -> None:
    """Raises ConfigError if model and latents do not fit, naming the keys."""
    place = config.latents if config.data.source == "latents" else config.data.clips.manifest
    pairs = {
        "dit.num_tokens": (config.dit.num_tokens, latents.num_tokens),
        "dit.token_dim": (config.dit.token_dim, latents.token_dim),
    }
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ConfigError(f"{key} is {ours}, but the latents in {place} have {theirs}.")
    if config.dit.num_frames < latents.num_frames:
        raise ConfigError(
            f"dit.num_frames is {config.dit.num_frames}, but the latents in {place} are clips of "
            f"{latents.num_frames} frames."
        )
    if config.dit.num_classes not in (0, len(latents.class_names)):
        raise ConfigError(
            f"dit.num_classes is {config.dit.num_classes}, but the latents in {place} have "
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

    encode = _encoder(config.data.vae) if config.data.source == "clips" else None
    return DiTTask(model, config.task, config.diffusion, latents.statistics, decode, encode)


if __name__ == "__main__":
    raise SystemExit(main(["train-dit", *sys.argv[1:]]))
