"""The main job: data, AR-VAE, latents, AR-DiT, videos, scores and a report, in minutes on two CPU cores.

Every stage is the job of one command, with its part of one configuration. A complete stage is not run again; an
interrupted stage resumes.

    python -m ray_jobs.quickstart --fast
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ardiff.cli import main
from ardiff.config import find_config, fingerprint
from ardiff.data import storage
from ardiff.data.manifest import class_names, read_manifest, usable
from ardiff.diffusion.ar_step import check_ar_step
from ardiff.errors import ConfigError
from ray_jobs import encode, evaluate_quick, generate, prepare, train_dit, train_vae
from ray_jobs.encode import EncodeConfig
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.quick import lacks_fvd
from ray_jobs.generation.config import GenerateConfig, VideoSets
from ray_jobs.prepare import PrepareConfig
from ray_jobs.reports.quickstart import write_quickstart_report
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import StageRecord, read_stage, record_run
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """Which videos the trained model is shown with."""

    ar_steps: tuple[int, ...] = (0, 5, 20)
    """Timestep differences; each gets a set of short videos and a score."""
    num_long: int = 8
    """Long videos."""
    long_frames: int = 128
    """Frames of a long video."""
    long_ar_step: int = 5
    """Timestep difference of the long videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """The whole path. Folders inside the stages' configurations are set by the quickstart itself."""

    output: str | None = None
    """Folder of everything. Default: runs/quickstart, or runs/quickstart-fast with --fast."""
    data: str | None = None
    """Your own videos, a folder or s3:// prefix, in place of the synthetic set."""
    fast: bool = False
    """Less data and weaker models, in under two minutes."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Data."""
    train_vae: TrainVAEConfig = field(default_factory=TrainVAEConfig)
    """AR-VAE training."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """Encoding."""
    train_dit: TrainDiTConfig = field(default_factory=TrainDiTConfig)
    """AR-DiT training."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Sampling."""
    evaluate: QuickConfig = field(default_factory=QuickConfig)
    """Scoring."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Which videos to sample."""

    def __post_init__(self) -> None:
        steps, window = self.generate.num_inference_steps, self.train_dit.dit.num_frames
        for ar_step in self.samples.ar_steps:
            check_ar_step(self.encode.num_frames, steps, ar_step, window)
        check_ar_step(self.samples.long_frames, steps, self.samples.long_ar_step, window)
        if self.generate.num_videos < self.evaluate.num_clips:
            raise ValueError("generate.num_videos must be at least evaluate.num_clips, or there is too little to score")

    @property
    def folder(self) -> str:
        """Where everything goes."""
        return self.output or ("runs/quickstart-fast" if self.fast else "runs/quickstart")


def config_paths(options: dict[str, str]) -> list[Path]:
    """The shipped configuration, under the faster one if that is asked for."""
    return [find_config("quickstart"), *([find_config("quickstart_fast")] if options.get("fast") == "true" else [])]


def run(config: QuickstartConfig) -> None:
    """Runs what is not done yet and writes the report. Raises ArdiffError."""
    root = config.folder
    if storage.is_remote(root):
        raise ConfigError("The quickstart writes to a local folder; the single commands write to s3:// too.")
    with ray_cluster():
        stages = Stages(functools.partial(record_run, root, config))
        data = data_stage(config, f"{root}/data")
        stages.do(prepare.run, data)
        inputs = encode_data(config, root, data, stages)
        pipeline = train_pipeline(config, root, inputs, stages)
        short = short_sets(config, root, pipeline)
        long = long_set(config, root, pipeline)
        stages.do(generate.run_sets, VideoSets(output=f"{root}/samples", sets=(*short, long)))
        scores = scoring(config, root, inputs, short)
        stages.do(evaluate_quick.run, scores, lambda record: lacks_fvd(scores, record.results))
    report = Path(root) / "report.html"
    write_quickstart_report(report, config, stages.records, [*short, long], scores)
    print_line(f"[bold]{report}[/]")


class Stages:
    """Runs stages that build on each other, each unless it is complete.

    A stage is named by its configuration and by the stage before it.
    """

    def __init__(self, record: Callable[[], None], before: Sequence[StageRecord] = ()) -> None:
        """``record`` is called before a stage runs. ``before`` are complete stages that the first one builds on."""
        self.record = record
        self.records = list(before)

    def do(
        self, job: Callable[..., Any], config: Any, again: Callable[[StageRecord], bool] = lambda record: False
    ) -> StageRecord:
        """The record of the stage that ``job(config, key)`` runs and ``config.output`` holds.

        A complete stage is run once more if ``again(record)`` says so. Raises ArdiffError.
        """
        key = fingerprint(config, self.records[-1].fingerprint if self.records else "")
        record = _done(config, key)
        if record is not None and not again(record):
            print_line(f"[green]✓[/] {record.name}: done before. {record.note}")
        else:
            self.record()  # not before: a run that is refused leaves the folder as it was
            job(config, key)
            record = read_stage(config.output)
            assert record is not None
        self.records.append(record)
        return record


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the AR-DiT is trained on and scored against."""

    manifest: str
    vae: str
    """Folder of the AR-VAE."""
    latents: str
    """Folder of the encoded clips."""
    synthetic: bool
    """Whether the videos are the drawn ones, whose shapes are known."""


def data_stage(config: QuickstartConfig, folder: str) -> PrepareConfig:
    """The data, to be put into ``folder``."""
    return replace(config.prepare, source=config.data or config.prepare.source, output=folder)


def encode_data(config: QuickstartConfig, root: str, data: PrepareConfig, stages: Stages) -> Inputs:
    """Trains the AR-VAE on the data and encodes them, both below ``root``.

    Raises DataError before anything is trained if no video is long enough to be encoded, or to be scored against.
    """
    videos, scores = read_manifest(data.manifest), _as_encoded(config)
    usable(videos, "train", config.encode.span, config.encode.fps)
    usable(videos, "test", scores.span, scores.fps)
    clips = replace(config.train_vae.clips, manifest=data.manifest)
    vae = replace(config.train_vae, output=f"{root}/vae", clips=clips)
    stages.do(train_vae.run, vae)
    latent_set = replace(config.encode, manifest=data.manifest, vae=vae.model, output=f"{root}/latents")
    latents = stages.do(encode.run, latent_set).results["folder"]
    return Inputs(data.manifest, vae.model, latents, data.source is None)


def train_pipeline(config: QuickstartConfig, root: str, inputs: Inputs, stages: Stages) -> str:
    """Trains the AR-DiT below ``root``. Returns the folder of the pipeline."""
    classes = len(class_names(read_manifest(inputs.manifest)))
    dit = replace(config.train_dit, output=f"{root}/dit", latents=inputs.latents)
    dit = replace(dit, dit=replace(dit.dit, num_classes=classes))
    stages.do(train_dit.run, dit)
    return dit.pipeline


def short_sets(config: QuickstartConfig, root: str, pipeline: str) -> list[GenerateConfig]:
    """The sets of short videos, one for each ``ar_step``."""
    videos = replace(config.generate, pipeline=pipeline, num_frames=config.encode.num_frames)
    return [replace(videos, output=f"{root}/samples/ar-step-{s}", ar_step=s) for s in config.samples.ar_steps]


def long_set(config: QuickstartConfig, root: str, pipeline: str) -> GenerateConfig:
    """The set of long videos."""
    return replace(
        config.generate,
        pipeline=pipeline,
        output=f"{root}/samples/long",
        num_frames=config.samples.long_frames,
        ar_step=config.samples.long_ar_step,
        num_videos=config.samples.num_long,
    )


def scoring(config: QuickstartConfig, root: str, inputs: Inputs, sets: Sequence[GenerateConfig]) -> QuickConfig:
    """How the sets are scored against held-out clips."""
    return replace(
        _as_encoded(config),
        real=inputs.manifest,
        fake=tuple(s.manifest for s in sets),
        vae=inputs.vae,
        output=f"{root}/scores",
        shapes=config.evaluate.shapes and inputs.synthetic,
    )


def _as_encoded(config: QuickstartConfig) -> QuickConfig:
    """Scores of clips of the length and frame rate that the AR-DiT is trained on."""
    scores = config.evaluate
    return replace(scores, num_frames=config.encode.num_frames, fps=scores.fps or config.encode.fps)


def _done(config: Any, key: str) -> StageRecord | None:
    """The record of the stage if it is complete. Raises ConfigError if what is there is another stage than ``key``."""
    record = read_stage(config.output)
    if record is None:
        return None
    if record.fingerprint == key:
        return record
    raise ConfigError(
        f"{config.output} holds the stage '{record.name}' of another configuration: give another --output, or "
        "delete the folder to run it again."
    )


if __name__ == "__main__":
    raise SystemExit(main(["quickstart", *sys.argv[1:]]))
