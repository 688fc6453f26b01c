"""Scores sets of generated videos against real ones, each score with its protocol, floor and interval, on Ray Data.

A set is a manifest, or a folder or S3 prefix of videos. Features of the real videos are kept for later evaluations.

    python -m ray_jobs.evaluate --real data/manifest.parquet --fake runs/videos --metrics fvd,kvd --num-clips 256
"""

import sys
from dataclasses import dataclass, fields
from typing import Any, Literal

from rich.markup import escape

from ardiff.cli import main
from ardiff.data.manifest import Split, VideoRecord, usable
from ardiff.errors import ConfigError
from ardiff.metrics.extractors import check_frames
from ardiff.metrics.protocol import PAIRED, RECIPES, MetricName, ProtocolName, recipe
from ardiff.metrics.scores import SetScore, table, write_scores
from ardiff.metrics.weights import NetworkName, State, find_state
from ray_jobs.evaluation import drift, metrics, quick
from ray_jobs.evaluation.datasets import Listed, codecs, locate, open_videos
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import record_run, stage, versions

ALIASES = {"num_frames": "frames"}
QUICK_ALONE = ("vae", "controls", "shapes", "extractor_seed", "i3d_clips")
"""Settings that protocol ``quick`` alone uses."""
NOT_QUICK = ("metrics", "weights", "drift", "device", "cache", "cpus_per_actor", "gpus_per_actor")
"""Settings that it does not use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is scored against what, and how."""

    real: str = "runs/data/manifest.parquet"
    """Real videos: a manifest, a folder or an ``s3://`` prefix; for psnr, ssim and lpips the originals."""
    fake: tuple[str, ...] = ()
    """Generated videos, one place per set: manifests, folders or ``s3://`` prefixes."""
    protocol: ProtocolName = "styleganv"
    """How frames are prepared and statistics taken, see docs/evaluation.md. ``quick`` is the quickstart's: a seeded
    random network, with controls."""
    metrics: tuple[MetricName, ...] = ("fvd",)
    """Scores to compute; psnr, ssim and lpips are of videos and their originals, matched by name."""
    output: str = "runs/scores"
    """Folder of ``scores.json``, ``scores.parquet`` and the features of the generated videos."""
    num_clips: int = 2048
    """Clips per set; the distances are biased by 1/N, so only sets of equal size compare."""
    num_frames: int = 16
    """Frames of a clip."""
    stride: int = 1
    """Distance between two frames of a real clip."""
    fps: float = 0.0
    """Frame rate at which real videos are seen, whatever their own is; ``stride`` counts frames at this rate. 0 takes
    frames as they come. Give the rate that the model was trained at: generated videos are taken frame by frame."""
    split: Split = "test"
    """Split of the real manifest: test or train. Folders have none."""
    resolution: int | None = None
    """Height and width that frames are scaled and cropped to first; without it all must have one size."""
    weights: tuple[str, ...] = ()
    """Files of network weights, local or ``s3://``, safetensors or PyTorch state dicts; the cache has the others."""
    bootstrap: int = 100
    """Resamples of the videos for the 95 % interval; 0 leaves it out."""
    drift: bool = False
    """Also score every 16 frames of the generated videos against real clips, and plot it."""
    seed: int = 0
    """Seed of the choice of real clips, of resampling and of controls."""
    batch_size: int = 16
    """Clips per task; on a GPU they go through the network together."""
    max_actors: int = 2
    """Scoring actors; started as there is work."""
    cpus_per_actor: float = 1.0
    """CPUs that an actor reserves; fractions let several share one."""
    gpus_per_actor: float = 1.0
    """GPUs that an actor reserves, where there are any; fractions let several share one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs where there are some."""
    cache: str | None = None
    """Place of the real videos' features, local or ``s3://``. Without it, $ARDIFF_CACHE or ~/.cache/ardiff."""
    vae: str | None = None
    """Protocol ``quick``: AR-VAE folder; with it the reconstruction of real clips is scored too."""
    controls: bool = True
    """Protocol ``quick``: also score damaged real clips."""
    shapes: bool = False
    """Protocol ``quick``: the videos show one shape of the synthetic set each; report motion and recognised classes."""
    extractor_seed: int = 0
    """Protocol ``quick``: seed of the random network."""
    i3d_clips: int = 16
    """Protocol ``quick``: clips per set for FVD, if the weights of I3D are in the cache; 0 leaves it out."""

    def __post_init__(self) -> None:
        if min(self.num_clips, self.num_frames) < 2 or min(self.stride, self.batch_size, self.max_actors) < 1:
            raise ValueError("num_clips and num_frames must be at least 2; stride, batch_size and max_actors 1")
        if self.protocol == "quick" and (self.batch_size < 2 or self.num_clips % self.batch_size == 1):
            raise ValueError("batch_size must be at least 2 and must not leave a last batch of one clip")
        if self.fps < 0:
            raise ValueError("fps must not be negative")
        if self.resolution is not None and self.resolution < 16:
            raise ValueError(f"resolution must be at least 16, got {self.resolution}")
        if self.bootstrap == 1 or self.bootstrap < 0:
            raise ValueError("bootstrap must be 0 or at least 2 resamples")
        if not self.cpus_per_actor > 0 or not self.gpus_per_actor > 0:
            raise ValueError("cpus_per_actor and gpus_per_actor must be positive")
        if self.i3d_clips == 1 or self.i3d_clips < 0:
            raise ValueError("i3d_clips must be 0 or at least 2")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics must name at least one score, and none of them twice")
        if set(PAIRED) & set(self.metrics) and (self.fps or self.stride != 1):
            raise ValueError("psnr, ssim and lpips are of all frames as they come: leave out fps and stride")
        idle = NOT_QUICK if self.protocol == "quick" else QUICK_ALONE
        for field in fields(self):
            if field.name in idle and getattr(self, field.name) != field.default:
                raise ValueError(f"protocol={self.protocol} does not use {field.name}: leave it out")

    @property
    def span(self) -> int:
        """Frames of a real video, at ``fps``, that a clip reaches over."""
        return (self.num_frames - 1) * self.stride + 1


def run(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Writes and returns the scores, as ``scores.json`` holds them.

    Raises:
        ArdiffError: A place holds no usable videos or too few, the protocol does not define a metric, or weights are
            missing. What can be checked without opening videos is checked before anything starts.
    """
    if config.protocol == "quick":
        return quick.run(config, key)
    real = _real(config)
    fakes = [locate(uri) for uri in config.fake]
    _check_names(fakes)
    weights = _weights(config)
    with ray_cluster(), stage("evaluate", config.output, key) as record:
        record_run(config.output, config)
        originals = open_videos(real, config.split, config.span, config.fps)
        opened = [(fake, _opened(fake, config)) for fake in fakes]
        for fake, records in opened:
            _warn_of_codecs(config, originals, fake, records)
        scores: list[SetScore] = []
        for metric in config.metrics:
            if metric not in PAIRED:
                scores += metrics.score_sets(config, metric, weights, real, originals, opened)
        if paired := [m for m in config.metrics if m in PAIRED]:
            scores += metrics.score_pairs(config, paired, weights, real, originals, opened)
        content = write_scores(config.output, scores, versions())
        if config.drift:
            drift.write(config, weights, originals, opened)
        record.results, record.note = content, f"{len(scores)} scores of {len(fakes)} sets"
        print_line(escape(table([(score.set, score) for score in scores])))
    return content


def check(config: EvaluateConfig) -> None:
    """Raises ArdiffError for what is wrong before a video is opened: the real ones, the metrics or their weights."""
    _real(config)
    if config.protocol != "quick":
        _weights(config)


def _real(config: EvaluateConfig) -> Listed:
    real = locate(config.real)
    if real.records is not None:
        usable(real.records, config.split, config.span, config.fps)
    return real


def _check_names(fakes: list[Listed]) -> None:
    if not fakes:
        raise ConfigError("There is nothing to score: give --fake, a manifest or folder of generated videos.")
    names = [fake.name for fake in fakes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two sets are called '{name}': keep generated videos in folders of different names.")


def _weights(config: EvaluateConfig) -> dict[str, tuple[State, str]]:
    """Weights and their hash of every network that the metrics need."""
    if config.drift:
        drift.check(config)
    networks: set[NetworkName] = set()
    for metric in config.metrics:
        if metric not in PAIRED:
            how = recipe(config.protocol, metric)
            check_frames(how, config.num_frames)
            networks.add(how.network)
    if "lpips" in config.metrics:
        networks.add("lpips-alex")
    if config.drift:
        networks.add(recipe(config.protocol, "fvd").network)
    return {name: find_state(name, config.weights) for name in sorted(networks)}


def _opened(fake: Listed, config: EvaluateConfig) -> list[VideoRecord]:
    return open_videos(fake, "test", config.num_frames)


def _warn_of_codecs(
    config: EvaluateConfig, originals: list[VideoRecord], fake: Listed, records: list[VideoRecord]
) -> None:
    """A codec on one side alone moves a distance more than most models differ."""
    recoded = all(m not in PAIRED and RECIPES[config.protocol, m].reencode for m in config.metrics)
    if codecs(originals) != codecs(records) and not recoded:
        print_line(
            f"[yellow]note[/] real videos are {codecs(originals)}, those of {escape(fake.name)} {codecs(records)}: "
            "compression of one side alone raises distances. Store both in the same way."
        )


if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
