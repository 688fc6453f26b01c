"""Generates videos with a trained pipeline in parallel: mp4 files, a manifest, a contact sheet.

What a video shows depends on its own label and seed, so a run that was interrupted goes on with the missing ones.

    python -m ray_jobs.generate pipeline=runs/quickstart/dit/pipeline num_frames=128 ar_step=5
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import VideoCodec, contact_sheet
from ardiff.data.manifest import write_manifest
from ardiff.errors import ArdiffError, ConfigError
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.params import SamplingMode
from ardiff.sweep.grid import row_id
from ardiff.sweep.models import SweptModel
from ardiff.sweep.rows import SUFFIXES, Record, VideoRow, find_complete, video_record
from ray_jobs.generation.actors import Workers, make_videos
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.stages import record_run, stage


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
    mode: SamplingMode = "window"
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
    model = SweptModel.load(job.sets[0].pipeline)
    for config in job.sets:
        if reason := _refusal(config, model):
            raise ConfigError(reason)
    with ray_cluster(), stage(name, job.output, key) as record:
        rows: list[list[VideoRow]] = []
        complete: dict[str, Record] = {}
        for config in job.sets:
            _claim(config, model)
            record_run(config.output, config)
            mine = [_row(config, model, i) for i in range(config.num_videos)]
            found = find_complete(mine, storage.absolute(config.output))
            complete |= {row.record: found[row.id] for row in mine if row.id in found}
            rows.append(mine)
        together = [row for mine in rows for row in mine]
        records = make_videos(together, complete, _workers(job.sets[0]), "generating")
        if failed := [(row, records[row.record]) for row in together if records[row.record].status == "failed"]:
            row, first = failed[0]
            raise ArdiffError(
                f"{len(failed)} of {len(together)} videos could not be made; the first, of seed {row.seed}, because of "
                f"{first.error}: {first.message} The same command tries them again."
            )
        for config, mine in zip(job.sets, rows, strict=True):
            _describe_set(config, model, mine, records)
        record.note = f"{len(together) - len(complete)} videos generated, {len(complete)} were there"


def _workers(config: GenerateConfig) -> Workers:
    return Workers(
        device=config.device,
        batch_size=config.batch_size,
        min_actors=1,
        max_actors=config.max_actors,
        cpu_threads=config.cpu_threads,
        gpus=1.0,
        engine=config.engine,
        attempts=2,
    )


def _describe_set(config: GenerateConfig, model: SweptModel, rows: list[VideoRow], records: dict[str, Record]) -> None:
    """Writes the manifest and the contact sheet of a complete set."""
    write_manifest(config.manifest, [video_record(row, records[row.record], model.resolution) for row in rows])
    shown = rows[: min(8, len(rows))]
    videos = np.stack([decode_clip(storage.read_bytes(row.uri), 0, config.num_frames) for row in shown])
    names = [row.class_name or f"seed {row.seed}" for row in shown]
    storage.write_bytes(storage.join(config.output, "sheet.png"), contact_sheet(videos, names))


def _refusal(config: GenerateConfig, model: SweptModel) -> str | None:
    shape = (config.num_frames, config.num_inference_steps, config.ar_step)
    return model.refusal(config.mode, *shape, config.class_label)


def _claim(config: GenerateConfig, model: SweptModel) -> None:
    """Marks the folder with the settings, or raises ConfigError if it holds videos of other ones."""
    name = fingerprint(
        model.weights,
        [
            config.num_frames,
            config.mode,
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


def _row(config: GenerateConfig, model: SweptModel, index: int) -> VideoRow:
    """What one video is made of, and where it goes."""
    classes, root = model.dit.num_classes, storage.absolute(config.output)
    label = config.class_label if config.class_label is not None else index % classes if classes else -1
    row = VideoRow(
        id="",
        cell="",
        checkpoint=storage.absolute(config.pipeline),
        weights=model.weights,
        num_frames=config.num_frames,
        ar_step=config.ar_step,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        mode=config.mode,
        precision=config.precision,
        label=label,
        class_name=model.class_name(label) if model.class_names else "",
        seed=config.seed + index,
        fps=config.fps,
        codec=config.codec,
        crf=config.crf,
        uri=storage.join(root, "videos", f"{index:05d}.{SUFFIXES[config.codec]}"),
        latents="",
        record=storage.join(root, "records", f"{index:05d}.json"),
    )
    return replace(row, id=row_id(row))


if __name__ == "__main__":
    raise SystemExit(main(["generate", *sys.argv[1:]]))
