"""The whole path in minutes on two CPU cores: data, AR-VAE, latents, AR-DiT, videos, scores and a report.

Each stage is the job of one command, with its section of one configuration. Complete stages are skipped, and an
interrupted stage resumes.

    python -m ray_jobs.quickstart --fast
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ardiff.cli import main
from ardiff.config import find_config
from ardiff.data import storage
from ardiff.data.manifest import class_names, read_manifest, usable
from ardiff.data.synthetic_captions import asks_for_held_out
from ardiff.diffusion.ar_step import check_ar_step
from ardiff.errors import ConfigError, DataError
from ardiff.sampling.params import ModelInfo
from ardiff.text.packages import PACKAGES, fetch
from ray_jobs import encode, evaluate_quick, generate, prepare, train_dit, train_vae
from ray_jobs.encode import EncodeConfig
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.quick import is_outdated
from ray_jobs.generation.config import GenerateConfig, VideoSets
from ray_jobs.prepare import PrepareConfig
from ray_jobs.reports.quickstart import write_quickstart_report
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import StageRunner, record_run
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """Videos to generate for the report."""

    ar_steps: tuple[int, ...] = (0, 5, 20)
    """Values of ``ar_step``. Each gets a set of short videos and a score."""
    num_long: int = 8
    """Number of long videos."""
    long_frames: int = 128
    """Frames of a long video."""
    long_ar_step: int = 5
    """``ar_step`` of the long videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """All stages. The quickstart itself sets the folders in the configurations of the stages."""

    output: str | None = None
    """Folder of all stages. Default: runs/quickstart, with -text and -fast for these options."""
    data: str | None = None
    """Your own videos, a folder or s3:// prefix, instead of the synthetic set."""
    fast: bool = False
    """Less data and weaker models: shows in minutes that everything runs, not what it can do."""
    text: bool = False
    """Videos with captions, and a model that takes prompts instead of classes."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """The data."""
    train_vae: TrainVAEConfig = field(default_factory=TrainVAEConfig)
    """AR-VAE training."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """Encoding of the latents."""
    train_dit: TrainDiTConfig = field(default_factory=TrainDiTConfig)
    """AR-DiT training."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Generation of the videos."""
    evaluate: QuickConfig = field(default_factory=QuickConfig)
    """Evaluation of the videos."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Videos to generate."""

    def __post_init__(self) -> None:
        model = ModelInfo.from_configs(self.train_dit.dit, self.train_dit.diffusion)
        steps, window = model.with_defaults(self.generate.params).resolved_num_inference_steps, model.num_frames
        for ar_step in self.samples.ar_steps:
            check_ar_step(self.encode.num_frames, steps, ar_step, window)
        check_ar_step(self.samples.long_frames, steps, self.samples.long_ar_step, window)
        if self.generate.num_videos < self.evaluate.num_clips:
            raise ValueError("generate.num_videos must be at least evaluate.num_clips, the number of clips to evaluate")

    @property
    def folder(self) -> str:
        """Folder of all stages."""
        return self.output or f"runs/quickstart{'-text' * self.text}{'-fast' * self.fast}"


def config_paths(options: dict[str, str]) -> list[Path]:
    """The shipped configuration, with the overrides for ``--text`` and ``--fast`` if given."""
    overlays = [name for name in ("text", "fast") if options.get(name) == "true"]
    return [find_config("quickstart"), *(find_config(f"quickstart_{name}") for name in overlays)]


def run(config: QuickstartConfig) -> None:
    """Runs the stages that are not complete and writes the report. Raises ArdiffError."""
    root = config.folder
    if storage.is_remote(root):
        raise ConfigError(
            "The quickstart writes to a local folder only. The commands of its stages can write to s3://."
        )
    if (encoder := config.encode.text.encoder) in PACKAGES:
        fetch(encoder)
    with ray_cluster():
        stages = StageRunner(functools.partial(record_run, root, config))
        data = data_stage(config, f"{root}/data")
        stages.run(prepare.run, data)
        inputs = encode_data(config, root, data, stages)
        pipeline = train_pipeline(config, root, inputs, stages)
        short = short_sets(config, root, pipeline)
        long = long_set(config, root, pipeline)
        stages.run(generate.run_sets, VideoSets(output=f"{root}/samples", sets=(*short, long)))
        evaluation = evaluation_stage(config, root, inputs, short)
        stages.run(evaluate_quick.run, evaluation, lambda record: is_outdated(evaluation, record.results))
    report = Path(root) / "report.html"
    write_quickstart_report(report, config, stages.records, [*short, long], evaluation)
    print_line(f"[bold]{report}[/]")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Training data of the AR-DiT, which is also what its videos are compared with."""

    manifest: str
    vae: str
    """Folder of the AR-VAE."""
    latents: str
    """Folder of the encoded clips."""
    synthetic: bool
    """Whether the videos are the synthetic ones, whose shapes are known."""


def data_stage(config: QuickstartConfig, folder: str) -> PrepareConfig:
    """The configuration of the data stage, with its output in ``folder``."""
    return replace(config.prepare, source=config.data or config.prepare.source, output=folder)


def encode_data(config: QuickstartConfig, root: str, data: PrepareConfig, stages: StageRunner) -> Inputs:
    """Trains the AR-VAE on the data and encodes the data, in folders below ``root``.

    Raises DataError, before training, if no video is long enough for encoding or for evaluation.
    """
    videos, evaluation = read_manifest(data.manifest), _as_encoded(config)
    usable(videos, "train", config.encode.span, config.encode.fps)
    usable(videos, "test", evaluation.span, evaluation.fps)
    clips = replace(config.train_vae.clips, manifest=data.manifest)
    vae = replace(config.train_vae, output=f"{root}/vae", clips=clips)
    stages.run(train_vae.run, vae)
    latent_set = replace(config.encode, manifest=data.manifest, vae=vae.model, output=f"{root}/latents")
    latents = stages.run(encode.run, latent_set).results["folder"]
    return Inputs(data.manifest, vae.model, latents, data.source is None)


def train_pipeline(config: QuickstartConfig, root: str, inputs: Inputs, stages: StageRunner) -> str:
    """Trains the AR-DiT below ``root``, and writes the files of its prompts. Returns the folder of the pipeline."""
    if config.text:
        write_prompts(config, root, inputs)
    classes = 0 if config.text else len(class_names(read_manifest(inputs.manifest)))
    dit = replace(config.train_dit, output=f"{root}/dit", latents=inputs.latents)
    dit = replace(dit, dit=replace(dit.dit, num_classes=classes))
    stages.run(train_dit.run, dit)
    return dit.pipeline


def short_sets(config: QuickstartConfig, root: str, pipeline: str) -> list[GenerateConfig]:
    """The sets of short videos, one per ``ar_step``; with prompts also one of those that are held out."""
    videos = replace(config.generate, pipeline=pipeline, num_frames=config.encode.num_frames)
    videos = replace(videos, prompts=_prompts(config, root, "test"))
    sets = [replace(videos, output=f"{root}/samples/ar-step-{s}", ar_step=s) for s in config.samples.ar_steps]
    if config.text and storage.exists(file := f"{root}/prompts/held-out.txt"):
        ar_step = config.samples.long_ar_step
        sets.append(replace(videos, output=f"{root}/samples/ar-step-{ar_step}-held-out", ar_step=ar_step, prompts=file))
    return sets


def long_set(config: QuickstartConfig, root: str, pipeline: str) -> GenerateConfig:
    """The set of long videos."""
    return replace(
        config.generate,
        pipeline=pipeline,
        output=f"{root}/samples/long",
        num_frames=config.samples.long_frames,
        ar_step=config.samples.long_ar_step,
        num_videos=config.samples.num_long,
        prompts=_prompts(config, root, "test"),
    )


def _prompts(config: QuickstartConfig, root: str, name: str) -> str | None:
    """A file of prompts below ``root``; None without ``--text``."""
    return f"{root}/prompts/{name}.txt" if config.text else None


def write_prompts(config: QuickstartConfig, root: str, inputs: Inputs) -> None:
    """Writes the first captions of the test videos as files of prompts: ``held-out.txt`` for a shape in a colour that
    no training video has, ``test.txt`` for the others.

    Raises DataError if no test video has a caption.
    """
    videos = usable(read_manifest(inputs.manifest), "test", config.encode.span, config.encode.fps)
    captions = [video.captions[0] for video in videos if video.captions]
    held_out = [caption for caption in captions if inputs.synthetic and asks_for_held_out(caption)]
    others = [caption for caption in captions if caption not in held_out]
    if not others:
        raise DataError(
            "No caption of a test video can be a prompt: docs/data.md shows where `ardiff prepare` finds captions."
        )
    for name, prompts in (("test", others), ("held-out", held_out)):
        if prompts:
            storage.write_bytes(f"{root}/prompts/{name}.txt", "\n".join(prompts).encode())


def evaluation_stage(
    config: QuickstartConfig, root: str, inputs: Inputs, sets: Sequence[GenerateConfig]
) -> QuickConfig:
    """The evaluation of the sets against held-out clips."""
    return replace(
        _as_encoded(config),
        real=inputs.manifest,
        fake=tuple(s.manifest for s in sets),
        vae=inputs.vae,
        output=f"{root}/scores",
        shapes=config.evaluate.shapes and inputs.synthetic,
    )


def _as_encoded(config: QuickstartConfig) -> QuickConfig:
    """The evaluation on clips with the length, frame rate and shape of the AR-DiT's training clips."""
    evaluation = config.evaluate
    return replace(
        evaluation,
        num_frames=config.encode.num_frames,
        fps=evaluation.fps or config.encode.fps,
        resolution=config.train_vae.vae.resolution,
    )


if __name__ == "__main__":
    raise SystemExit(main(["quickstart", *sys.argv[1:]]))
