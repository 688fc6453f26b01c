"""Generates videos with a trained pipeline in parallel: mp4 files, a manifest, a contact sheet.

What a video shows depends on its own label and seed, so a run that was interrupted goes on with the missing ones.

    python -m ray_jobs.generate pipeline=runs/quickstart/dit/pipeline num_frames=128 ar_step=5
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import ray.data
import torch

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import VideoCodec, contact_sheet, encode_video
from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.diffusion.ad import check_ar_step
from ardiff.errors import ConfigError
from ardiff.pipeline import ARDiffusionPipeline, Executor
from ardiff.sampling import EngineConfig, why_not_cached
from ray_jobs.common import ray_cluster, record_run, remote_progress, resolve_device, stage, telling


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What to generate."""

    pipeline: str = "runs/dit/pipeline"
    """Folder of the trained pipeline, local or s3://."""
    output: str = "runs/videos"
    """Folder of the videos and their manifest."""
    num_videos: int = 16
    """Videos to generate; seeds count up from ``seed``."""
    num_frames: int = 16
    """Frames per video."""
    ar_step: int = 5
    """The paper's timestep difference: 0 is synchronous, ``num_inference_steps`` auto-regressive."""
    num_inference_steps: int = 50
    """Sampling steps per frame."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    executor: Executor = "window"
    """``window``, ``full`` (the same videos, slowly), or ``rolling`` (for models trained with a band mask)."""
    class_label: int | None = None
    """Class of all videos; without one the classes take turns."""
    seed: int = 0
    """Seed of the first video."""
    batch_size: int = 16
    """Videos generated together by one actor."""
    fps: float = 8.0
    """Frames per second of the files."""
    codec: VideoCodec = "h264"
    """Codec of the files."""
    crf: int = 8
    """Quality of the files; smaller is better."""
    max_actors: int = 1
    """Generating actors; on a GPU cluster each takes one GPU."""
    cpu_threads: int = 2
    """Threads of a CPU actor, which is also the CPUs it asks Ray for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs where there are some."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights, and of the arithmetic in the models."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Limits and ways of computing of the sampling engine."""

    def __post_init__(self) -> None:
        if min(self.num_videos, self.batch_size, self.max_actors, self.cpu_threads) < 1:
            raise ValueError("num_videos, batch_size, max_actors and cpu_threads must be at least 1")

    @property
    def manifest(self) -> str:
        """Where the manifest of the videos is written."""
        return storage.join(self.output, "manifest.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSets:
    """Several sets of videos, made by the same actors in one job; what concerns actors is that of the first."""

    output: str
    """Folder of the stage's record."""
    sets: tuple[GenerateConfig, ...]


def run(config: GenerateConfig, key: str = "") -> None:
    """Generates what is missing. Raises ArdiffError before any work if the pipeline cannot do what is asked."""
    shape = f"{config.num_frames} frames, ar_step {config.ar_step}"
    run_sets(VideoSets(output=config.output, sets=(config,)), key, f"generate {shape}")


def run_sets(job: VideoSets, key: str = "", name: str = "generate") -> None:
    """Generates what is missing of each set, all with one pipeline. Raises ArdiffError as :func:`run` does."""
    pipeline = ARDiffusionPipeline.from_pretrained(job.sets[0].pipeline)
    for config in job.sets:
        _check(config, pipeline)
    with ray_cluster(), stage(name, job.output, key) as record:
        rows = []
        for number, config in enumerate(job.sets):
            _claim(config)
            record_run(config.output, config)
            rows += [{**_row(config, pipeline, i), "set": number} for i in range(config.num_videos)]
        missing = [row for row in rows if not storage.exists(row["uri"])]
        if missing:
            _generate(job.sets, missing)
        for number, config in enumerate(job.sets):
            _describe_set(config, pipeline, [row for row in rows if row["set"] == number])
        record.note = f"{len(missing)} videos generated, {len(rows) - len(missing)} were there"


def _describe_set(config: GenerateConfig, pipeline: ARDiffusionPipeline, rows: list[dict[str, Any]]) -> None:
    """Writes the manifest and the contact sheet of a complete set."""
    write_manifest(config.manifest, [_record(config, pipeline, row) for row in rows])
    shown = rows[: min(8, len(rows))]
    videos = np.stack([decode_clip(storage.read_bytes(row["uri"]), 0, config.num_frames) for row in shown])
    storage.write_bytes(storage.join(config.output, "sheet.png"), contact_sheet(videos, [row["name"] for row in shown]))


def _check(config: GenerateConfig, pipeline: ARDiffusionPipeline) -> None:
    classes = pipeline.dit.config.num_classes
    if config.executor != "full" and (reason := why_not_cached(pipeline.dit.config)) is not None:
        raise ConfigError(f"executor={config.executor} cannot sample {config.pipeline}: {reason}.")
    try:
        window = None if config.executor == "rolling" else pipeline.dit.config.num_frames
        check_ar_step(config.num_frames, config.num_inference_steps, config.ar_step, window)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.num_inference_steps > pipeline.diffusion.num_timesteps:
        raise ConfigError(f"num_inference_steps must be at most {pipeline.diffusion.num_timesteps}.")
    if config.class_label is not None and not 0 <= config.class_label < classes:
        valid = f"has classes 0..{classes - 1}" if classes else "has no classes"
        raise ConfigError(f"class_label {config.class_label} is out of range: the model {valid}.")


def _claim(config: GenerateConfig) -> None:
    """Marks the folder with the settings, or raises ConfigError if it holds videos of other ones."""
    weights = hashlib.sha256()
    for file in ("config.json", "vae.safetensors", "dit.safetensors"):
        weights.update(storage.read_bytes(storage.join(config.pipeline, file)))
    name = fingerprint(
        weights.hexdigest(),
        [
            config.num_frames,
            config.executor,
            config.ar_step,
            config.num_inference_steps,
            config.guidance_scale,
            config.class_label,
            config.precision,
        ],
        [config.seed, config.fps, config.codec, config.crf],
    )
    place = storage.join(config.output, "settings.txt")
    if storage.exists(place) and storage.read_bytes(place).decode() != name:
        raise ConfigError(f"{config.output} holds videos of another model or other settings: give another output.")
    storage.write_bytes(place, name.encode())


def _row(config: GenerateConfig, pipeline: ARDiffusionPipeline, index: int) -> dict[str, Any]:
    """What one video is made of, and where it goes. Label -1 means none."""
    classes = pipeline.dit.config.num_classes
    label = config.class_label if config.class_label is not None else index % classes if classes else -1
    suffix = "webm" if config.codec == "vp9" else "mp4"
    uri = storage.join(storage.absolute(config.output), "videos", f"{index:05d}.{suffix}")
    name = pipeline.class_names[label] if label >= 0 and pipeline.class_names else f"seed {config.seed + index}"
    return {"uri": uri, "label": label, "seed": config.seed + index, "name": name}


def _generate(sets: Sequence[GenerateConfig], rows: list[dict[str, Any]]) -> None:
    config = sets[0]
    device = resolve_device(config.device)
    total = sum(sets[row["set"]].num_frames for row in rows)
    with remote_progress("generating", total, "frame") as monitor:
        done = (
            ray.data.from_items(rows, override_num_blocks=-(-len(rows) // config.batch_size))
            .map_batches(
                _Generator,
                fn_constructor_args=(sets, device.type, monitor),
                batch_size=config.batch_size,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
                num_gpus=1 if device.type == "cuda" else 0,
                num_cpus=config.cpu_threads,
            )
            .count()
        )
    assert done == len(rows)


class _Generator:
    """An actor that holds the pipeline, generates the videos of a batch and writes each as one file."""

    def __init__(self, sets: Sequence[GenerateConfig], device: str, monitor: Any) -> None:
        config = sets[0]
        torch.set_num_threads(config.cpu_threads)
        self.sets, self.monitor = sets, monitor
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.pipeline = ARDiffusionPipeline.from_pretrained(config.pipeline, device, dtype, config.engine)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with telling(self.monitor):
            for number in np.unique(batch["set"]):
                chosen = batch["set"] == number
                self._generate(self.sets[number], {name: values[chosen] for name, values in batch.items()})
        return {"uri": batch["uri"]}

    def _generate(self, config: GenerateConfig, batch: dict[str, Any]) -> None:
        """Generates videos of one set together."""
        finished = 0

        def advance(final_frames: int) -> None:
            nonlocal finished
            self.monitor.add.remote((final_frames - finished) * len(batch["uri"]))
            finished = final_frames

        labels = [int(label) for label in batch["label"]]
        videos = self.pipeline(
            class_label=None if labels[0] < 0 else labels,
            num_frames=config.num_frames,
            ar_step=config.ar_step,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            executor=config.executor,
            seed=[int(seed) for seed in batch["seed"]],
            on_frames=advance,
        )
        for uri, video in zip(batch["uri"], videos.numpy(), strict=True):
            storage.write_bytes(str(uri), encode_video(video, config.fps, config.codec, config.crf))


def _record(config: GenerateConfig, pipeline: ARDiffusionPipeline, row: dict[str, Any]) -> VideoRecord:
    side = pipeline.vae.config.resolution
    label, name = max(row["label"], 0), row["name"] if row["label"] >= 0 else "video"
    shape = (config.codec, side, side, config.fps, config.num_frames)
    return VideoRecord(row["uri"], storage.size(row["uri"]), *shape, label, name, "test", "ok", "")


if __name__ == "__main__":
    raise SystemExit(main(["generate", *sys.argv[1:]]))
