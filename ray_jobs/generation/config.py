"""Configurations of `ardiff generate` and `ardiff sweep`."""

from dataclasses import dataclass, field
from typing import Literal

from ardiff.data import storage
from ardiff.data.encode import VideoCodec
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.params import FROM_INPUT, SamplingParams
from ardiff.sweep.grid import GridConfig
from ardiff.sweep.specs import OutputSettings
from ray_jobs.evaluation.config import EvaluateConfig, QuickConfig
from ray_jobs.generation.actors import WorkerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(SamplingParams):
    """Settings of `ardiff generate`, beside the sampling parameters of its videos."""

    pipeline: str = "runs/dit/pipeline"
    """Folder of the trained pipeline, local or s3://."""
    output: str = "runs/videos"
    """Folder of the videos and their manifest."""
    num_videos: int = 16
    """Videos to generate; seeds count up from ``seed``."""
    prompts: str | None = None
    """File with a prompt on each line, local or s3://. The videos take them in turn."""
    batch_size: int = 16
    """Videos that one actor generates together."""
    fps: float = 8.0
    """Frames per second of the files."""
    codec: VideoCodec = "h264"
    """Codec of the files."""
    crf: int = 8
    """Quality of the files; smaller is better."""
    max_actors: int = 1
    """Generating actors; on a GPU cluster each takes one GPU."""
    cpu_threads: int = 2
    """Threads of a CPU actor, and the CPUs that it reserves in Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs if the cluster has any."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights and of the arithmetic in the models."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Limits and backends of the sampling engine."""

    def __post_init__(self) -> None:
        if min(self.num_videos, self.batch_size, self.max_actors, self.cpu_threads) < 1:
            raise ValueError("num_videos, batch_size, max_actors and cpu_threads must be at least 1")
        if names := set(FROM_INPUT) & self.params.changed().keys():
            raise ValueError(f"{', '.join(sorted(names))} cannot be set: `ardiff generate` has no such input")
        if self.prompts is not None and self.prompt is not None:
            raise ValueError("give prompt or prompts, not both")

    @property
    def manifest(self) -> str:
        """The manifest of the videos."""
        return storage.join(self.output, "manifest.parquet")

    @property
    def files(self) -> OutputSettings:
        """Where the videos are stored, and in which format."""
        return OutputSettings(output=self.output, fps=self.fps, codec=self.codec, crf=self.crf)

    @property
    def workers(self) -> WorkerSettings:
        """The generating actors."""
        return WorkerSettings(
            device=self.device,
            batch_size=self.batch_size,
            min_actors=1,
            max_actors=self.max_actors,
            cpu_threads=self.cpu_threads,
            gpus=1.0,
            engine=self.engine,
            attempts=2,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSets:
    """Several sets of videos that the same actors generate in one job. The actors are those of the first set."""

    output: str
    """Folder of the stage's record."""
    sets: tuple[GenerateConfig, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Settings of `ardiff sweep`: videos, actors and scores."""

    grid: GridConfig = field(default_factory=GridConfig)
    """Every combination of its values is a video."""
    output: str = "runs/sweep"
    """Folder of the videos, their records and manifest, the scores and the report, local or s3://."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights and of the arithmetic in the models."""
    keep_latents: bool = False
    """Also store the latents of each video, as safetensors."""
    evaluate: Literal["none", "published", "quick"] = "none"
    """Score every sweep point that has enough videos against ``real``: ``published`` by a published protocol as
    ``scores`` says, ``quick`` by the quick evaluation as ``quick`` says."""
    real: str | None = None
    """Real videos: a manifest, a folder or an ``s3://`` prefix."""
    scores: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How ``evaluate=published`` scores sweep points. The sweep sets ``real``, ``fake`` and ``output``."""
    quick: QuickConfig = field(default_factory=QuickConfig)
    """How ``evaluate=quick`` scores sweep points. The sweep sets ``real``, ``fake`` and ``output``."""
    fps: float = 8.0
    """Frames per second of the files."""
    codec: VideoCodec = "h264"
    """Codec of the files."""
    crf: int = 8
    """Quality of the files; smaller is better."""
    batch_size: int = 16
    """Videos of a sweep point that an actor generates together; halved if they do not fit into memory."""
    min_actors: int = 1
    """Generating actors at the start; Ray adds further ones, up to ``max_actors``, while batches are left."""
    max_actors: int = 1
    """Generating actors at most."""
    cpu_threads: int = 1
    """Threads of an actor, and the CPUs that it reserves in Ray."""
    gpus_per_actor: float = 1.0
    """GPUs that an actor reserves on a GPU cluster; fractions let several actors share one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs if the cluster has any."""
    attempts: int = 2
    """Attempts at a video alone before it is recorded as failed."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Limits and backends of the sampling engine."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.min_actors, self.cpu_threads, self.attempts) < 1:
            raise ValueError("batch_size, min_actors, cpu_threads and attempts must be at least 1")
        if self.max_actors < self.min_actors or not self.gpus_per_actor > 0 or not self.fps > 0:
            raise ValueError("max_actors must be at least min_actors, gpus_per_actor and fps positive")
        if self.evaluate != "none" and self.real is None:
            raise ValueError("evaluate needs real videos: give real=MANIFEST_OR_FOLDER")

    @property
    def scoring(self) -> EvaluateConfig | QuickConfig:
        """The configuration that scores sweep points."""
        return self.quick if self.evaluate == "quick" else self.scores

    @property
    def files(self) -> OutputSettings:
        """Where the videos are stored, and in which format."""
        return OutputSettings(
            output=self.output, fps=self.fps, codec=self.codec, crf=self.crf, keep_latents=self.keep_latents
        )

    @property
    def workers(self) -> WorkerSettings:
        """The generating actors."""
        return WorkerSettings(
            device=self.device,
            batch_size=self.batch_size,
            min_actors=self.min_actors,
            max_actors=self.max_actors,
            cpu_threads=self.cpu_threads,
            gpus=self.gpus_per_actor,
            engine=self.engine,
            attempts=self.attempts,
        )
