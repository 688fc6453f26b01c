"""Configurations of the two evaluations: by a published protocol, and the quick evaluation of the quickstart."""

from dataclasses import dataclass, field
from typing import Literal

from ardiff.data.filters import FilterMode
from ardiff.data.manifest import Split
from ardiff.data.packages import cache_folder
from ardiff.metrics.compiled import Backend
from ardiff.metrics.drift import SEGMENT
from ardiff.metrics.networks.random3d import MIN_FRAMES
from ardiff.metrics.protocol import ProtocolName
from ardiff.metrics.registry import (
    MetricSpec,
    Network,
    PairedMetric,
    find_metric,
    find_spec,
    scored_metric_names,
    set_specs,
)
from ardiff.resolution import Resolution
from ray_jobs.evaluation.frames import Fit


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredClips:
    """What both evaluations share: the videos, the clips taken from them, and the resampling of scores."""

    real: str = "runs/data/manifest.parquet"
    """Real videos: a manifest, a folder, an ``s3://`` prefix or an array file, npy, npz or GIF. Paired metrics take the
    originals from here."""
    fake: tuple[str, ...] = ()
    """Sets of generated videos: manifests, folders, ``s3://`` prefixes or array files, npy, npz or GIF."""
    output: str = "runs/scores"
    """Folder of ``scores.json``, ``scores.parquet`` and the features of the generated videos."""
    num_clips: int = 2048
    """Clips per set. Distances are biased by 1/N, so only sets of equal size are comparable."""
    num_frames: int = 16
    """Frames of a clip."""
    stride: int = 1
    """Frames from one frame of a real clip to the next."""
    fps: float = 0.0
    """Frame rate at which real videos are sampled; ``stride`` counts frames at this rate. 0 keeps each video's own
    rate. Give the rate that the model was trained at: all frames of generated videos are taken."""
    split: Split = "test"
    """Split of the real manifest: test or train. A folder has none."""
    resolution: Resolution | None = None
    """Scale frames to this height and width first: one number, or height,width. Without it, all videos must have one
    size."""
    fit: Fit = "crop"
    """How frames get the aspect ratio of ``resolution``, or without it become square: ``crop`` keeps their centre,
    ``stretch`` changes their aspect."""
    partitions: int = 16
    """Random partitions of the videos into quarters, for the 95 % interval of distances; 0 leaves it out."""
    seed: int = 0
    """Seed of the choice of real and generated clips, of partitions and of controls."""
    batch_size: int = 16
    """Clips per task. On a GPU they pass the network together."""
    max_actors: int = 2
    """Most actors that extract features. Ray Data starts them as there is work."""

    def __post_init__(self) -> None:
        if min(self.num_clips, self.num_frames) < 2 or min(self.stride, self.batch_size, self.max_actors) < 1:
            raise ValueError("num_clips and num_frames must be at least 2; stride, batch_size and max_actors 1")
        if self.fps < 0:
            raise ValueError("fps must not be negative")
        if self.resolution is not None and min(self.resolution) < 16:
            raise ValueError(f"resolution must be at least 16, got {self.resolution.plain}")
        if self.partitions < 0:
            raise ValueError("partitions must not be negative")

    @property
    def choice(self) -> str:
        """How clips are chosen, for protocols."""
        return f"drawn with seed {self.seed}, balanced over classes"

    @property
    def span(self) -> int:
        """Frames of a real video, at ``fps``, from the first to the last frame of a clip."""
        return (self.num_frames - 1) * self.stride + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(ScoredClips):
    """Scores by a published protocol."""

    protocol: ProtocolName = "styleganv"
    """How frames are prepared and statistics computed, see docs/evaluation.md."""
    metrics: tuple[str, ...] = field(default=("fvd",), metadata={"choices": scored_metric_names})
    """Metrics to compute. psnr, ssim, ssim-grey, lpips and lpips-vgg compare each video with its original, the real
    video of the same name."""
    features: tuple[str, ...] = ()
    """Features of generated videos from any network, instead of ``fake``: npz, npy or Parquet files, one per set, with
    one row per video. Their Frechet and kernel distances are computed; by the protocol jedi, JEDi's distance."""
    real_features: str | None = None
    """The features of real videos that ``features`` are compared with."""
    reconstruct: str | None = None
    """AR-VAE folder: also score its reconstructions of the real clips, against the clips themselves."""
    weights: tuple[str, ...] = ()
    """Files of network weights, local or ``s3://``, safetensors or PyTorch state dicts; or models of the package
    transformers, as folders, ``s3://`` prefixes or names of hub repositories. Other weights come from the cache."""
    deinterlace: FilterMode = field(default="off", metadata={"omit_default": True})
    """``auto`` deinterlaces interlaced videos of folders of real videos. A manifest has its own filters."""
    tone_map: FilterMode = field(default="off", metadata={"omit_default": True})
    """``auto`` maps HDR videos of folders of real videos to SDR. A manifest has its own filters."""
    drift: bool = False
    """Also score every 16 frames of the generated videos against real clips, and plot the scores."""
    shapes: bool = False
    """Every video shows one shape of the synthetic set: ``drift`` also measures which shape each frame shows."""
    train: str | None = None
    """Videos that the model was trained on, a manifest (its train split) or folder, to find copies of them among the
    generated ones. Without it, the real clips of the score are searched."""
    cpus_per_actor: float = 1.0
    """CPUs that an actor reserves, and clips that it measures at once; with a fraction, several actors share one."""
    gpus_per_actor: float = 1.0
    """GPUs that an actor reserves if there are any; with a fraction, several actors share one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses GPUs if there are any."""
    backend: Backend = "torch"
    """What computes the networks on CPUs: ``torch``, or ``openvino``, which computes I3D faster."""
    cache: str | None = None
    """Folder or ``s3://`` prefix of the real videos' features. Without it, $ARDIFF_CACHE or ~/.cache/ardiff."""

    def __post_init__(self) -> None:
        ScoredClips.__post_init__(self)
        if not self.cpus_per_actor > 0 or not self.gpus_per_actor > 0:
            raise ValueError("cpus_per_actor and gpus_per_actor must be positive")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics must name at least one metric, and none of them twice")
        if self.paired_metrics and (self.fps or self.stride != 1):
            names = ", ".join(metric.name for metric in self.paired_metrics)
            raise ValueError(f"{names} compare all frames of the videos: leave out fps and stride")
        if bool(self.features) != bool(self.real_features):
            raise ValueError("features and real_features go together: give the files of both sides")
        if self.features and (self.fake or self.reconstruct or self.drift or self.metrics != ("fvd",)):
            raise ValueError("features are scored alone: leave out fake, reconstruct, drift and metrics")
        if self.drift and self.reconstruct and not self.fake:
            raise ValueError("drift is of generated videos: give fake too")
        if not self.features:
            for spec in self.set_metrics.values():
                spec.network.check_frames(self.num_frames)
        if self.drift and self.protocol not in set_specs(find_metric("fvd")):
            raise ValueError(f"drift is measured by fvd, which {self.protocol} does not define: use styleganv")
        if self.backend == "openvino" and not self.features:
            refused = [spec.network.name for spec in self.specs if spec.network.prepare_openvino is None]
            if refused:
                raise ValueError(f"OpenVINO does not compute the network '{refused[0]}': use backend=torch")
        if self.shapes and not self.drift:
            raise ValueError("shapes is measured by drift: give --drift too, or use `ardiff evaluate-quick --shapes`")
        if self.drift and (self.num_frames % SEGMENT or self.num_frames < 2 * SEGMENT):
            raise ValueError(
                f"drift compares segments of {SEGMENT} frames: give --frames 32, 128 or another multiple of {SEGMENT}"
            )

    @property
    def cache_uri(self) -> str:
        """The cache that is used."""
        return self.cache or str(cache_folder())

    @property
    def set_metrics(self) -> dict[str, MetricSpec]:
        """How the protocol computes each of the metrics that compare two sets. Raises ValueError."""
        names = [name for name in self.metrics if not isinstance(find_metric(name), PairedMetric)]
        return {name: find_spec(self.protocol, name) for name in names}

    @property
    def paired_metrics(self) -> list[PairedMetric]:
        """The metrics that compare videos with their originals. Raises ValueError for an unknown metric."""
        return [metric for name in self.metrics if isinstance(metric := find_metric(name), PairedMetric)]

    @property
    def drift_spec(self) -> MetricSpec:
        """How the distances of ``drift`` are computed."""
        return find_spec(self.protocol, "fvd")

    @property
    def specs(self) -> list[MetricSpec]:
        """How all metrics that compare two sets are computed, that of ``drift`` included."""
        return [*self.set_metrics.values(), *([self.drift_spec] if self.drift else [])]

    @property
    def networks(self) -> dict[str, Network]:
        """The networks of all metrics, by name."""
        of_pairs = [metric.network for metric in self.paired_metrics if metric.network is not None]
        needed = [*(spec.network for spec in self.specs), *of_pairs]
        return {network.name: network for network in sorted(needed, key=lambda network: network.name)}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickConfig(ScoredClips):
    """Scores small synthetic videos with a seeded random network, beside damaged real clips as controls."""

    vae: str | None = None
    """AR-VAE folder, to also score the reconstruction of real clips."""
    controls: bool = True
    """Also score damaged real clips."""
    shapes: bool = False
    """Every video shows one shape of the synthetic set: also report motion and recognised classes."""
    extractor_seed: int = 0
    """Seed of the random network."""
    i3d_clips: int = 16
    """Clips per set for FVD, if the weights of I3D are in the cache; 0 leaves FVD out."""

    def __post_init__(self) -> None:
        ScoredClips.__post_init__(self)
        if self.num_frames < MIN_FRAMES:
            raise ValueError(f"num_frames must be at least {MIN_FRAMES}: the distance measures how changes change")
        if self.batch_size < 2 or self.num_clips % self.batch_size == 1:
            raise ValueError("batch_size must be at least 2 and must not leave a last batch of one clip")
        if self.i3d_clips == 1 or self.i3d_clips < 0:
            raise ValueError("i3d_clips must be 0 or at least 2")
