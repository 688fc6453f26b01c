"""Settings of the estimates."""

from dataclasses import dataclass, field
from typing import Literal

from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit.config import DiTConfig
from ardiff.models import AnyAutoencoderConfig, AnyDiTConfig
from ardiff.sampling.params import ModelInfo, SamplingParams, validate
from ardiff.train.tasks.config import DistillTaskConfig
from ardiff.train.tasks.distill import diffusion_of_student
from ardiff.vae.config import AutoencoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkConfig:
    """Size of the jobs and price of a GPU. The defaults are the paper's AR-DiT and its Table 2 on one class."""

    num_updates: int = 150_000
    """Training updates."""
    distill_updates: int = 0
    """Updates of `ardiff distill`, with the same batch. If there are any, the student generates the videos."""
    num_clips: int = 10_000
    """Clips to encode, each as long as a training clip."""
    num_videos: int = 2560
    """Videos to generate, over all points of a sweep."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Parameters of the generated videos."""
    num_scored: int = 3072
    """Clips of 16 frames for FVD, generated and real ones together."""
    replicas: int = 1
    """Replicas of the endpoint, one GPU each."""
    endpoint_hours: float = 720.0
    """Hours that the endpoint runs."""
    gpu_dollars: float = 4.10
    """Price of a GPU hour (p4d.24xlarge on demand in us-east-1 when last checked: 32.77 for eight GPUs)."""
    float32_tflops: float = 19.5
    """Peak of one GPU in float32, the precision of FVD, in 10^12 operations per second (A100: 19.5)."""

    def __post_init__(self) -> None:
        if (
            min(self.num_updates, self.distill_updates, self.num_clips, self.num_videos, self.num_scored, self.replicas)
            < 0
        ):
            raise ValueError("numbers of updates, clips, videos and replicas must not be negative")
        if min(self.endpoint_hours, self.gpu_dollars) < 0 or self.float32_tflops <= 0:
            raise ValueError("endpoint_hours and gpu_dollars must not be negative, float32_tflops above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """A model, a batch and a machine. The defaults are the paper's AR-DiT on eight A800 GPUs."""

    model: Literal["dit", "vae"] = "dit"
    """The model to train."""
    dit: AnyDiTConfig = field(default_factory=DiTConfig)
    """Sizes of the AR-DiT."""
    vae: AnyAutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Sizes of the AR-VAE."""
    num_frames: int = 16
    """Frames of a training clip; 1 in the first two stages of the AR-VAE."""
    micro_batch_size: int = 16
    """Clips per forward pass and GPU."""
    gradient_accumulation: int = 8
    """Forward passes per update."""
    num_gpus: int = 8
    """GPUs that train together."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of forward and backward pass."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    gpu_memory_gib: float = 40.0
    """Memory of one GPU in GiB. A tenth is reserved for workspaces and fragmentation."""
    peak_tflops: float = 312.0
    """Peak of one GPU at this precision, in 10^12 operations per second (A100 and A800: 312 in bf16)."""
    utilisation: float = 0.4
    """Share of the peak that training reaches. This is an assumption: measure it."""
    bandwidth_gb: float = 200.0
    """Bandwidth of a GPU to the others, in 10^9 bytes per second (A800: 400 in both directions together)."""
    distill: DistillTaskConfig = field(default_factory=DistillTaskConfig)
    """The student of ``work.distill_updates``."""
    work: WorkConfig = field(default_factory=WorkConfig)
    """Size of the jobs."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.micro_batch_size, self.gradient_accumulation, self.num_gpus) < 1:
            raise ValueError("num_frames, micro_batch_size, gradient_accumulation and num_gpus must be at least 1")
        if min(self.gpu_memory_gib, self.peak_tflops, self.bandwidth_gb) <= 0 or not 0 < self.utilisation <= 1:
            raise ValueError("gpu_memory_gib, peak_tflops and bandwidth_gb must be above 0, utilisation in (0, 1]")
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """The parameters of the generated videos, complete. Raises ValueError if the AR-DiT cannot sample them."""
        diffusion = DiffusionConfig()
        if self.work.distill_updates:
            diffusion = diffusion_of_student(self.distill, diffusion)
        return validate(self.work.sampling, ModelInfo.from_configs(self.dit, diffusion))

    @property
    def sizes(self) -> AutoencoderConfig | DiTConfig:
        """Sizes of the model to train."""
        return self.dit if self.model == "dit" else self.vae

    @property
    def rate(self) -> float:
        """Operations per second of a GPU."""
        return self.peak_tflops * 1e12 * self.utilisation

    @property
    def element_bytes(self) -> int:
        """Size of an activation's element. On GPUs autocast keeps normalisations in float32, which is not counted."""
        return 2 if self.precision == "bf16" else 4
