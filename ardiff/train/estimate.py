"""Memory and time of a training step before there is a cluster: what each ZeRO stage takes on every GPU; and GPU hours
and price of the jobs, from training to the endpoint.

Operations and activations are counted on models of one and two blocks whose tensors have shapes but no memory, and
drawn out to the full depth, in which both are linear. So the counts follow the code that runs. `docs/scaling.md` has
the formulas and the figures for the paper's sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ardiff.diffusion.ar_step import check_ar_step
from ardiff.dit import DiT, DiTConfig
from ardiff.metrics.networks.i3d import I3D
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.params import SamplingParams
from ardiff.train.flops import FlopCounter
from ardiff.vae import ARAutoencoder, AutoencoderConfig

STAGES = (0, 1, 2, 3)
SCORED_FRAMES = 16
"""Of a clip that FVD is computed of."""
MASTER_BYTES = 16
"""Per parameter: weight, two moments and average in float32."""

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's ``reduce_bucket_size`` where ``train.deepspeed.raw`` does not say otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkConfig:
    """How much the jobs do, and what a GPU costs. The defaults are the paper's AR-DiT, and its Table 2 on one class."""

    num_updates: int = 150_000
    """Updates of the training."""
    num_clips: int = 10_000
    """Clips that are encoded; each is as long as one of training."""
    num_videos: int = 2560
    """Videos that are generated, of all cells of a sweep together."""
    num_frames: int | None = None
    """Frames of a generated video; none for as many as the AR-DiT sees at once."""
    num_inference_steps: int = 50
    """Sampling steps per frame."""
    ar_step: int = 5
    """Timestep difference of neighbouring frames. It matters to videos longer than the model only."""
    guided: bool = False
    """Classifier-free guidance, which evaluates every frame twice."""
    num_scored: int = 3072
    """Clips of 16 frames that FVD is computed of, generated and real ones together."""
    replicas: int = 1
    """Replicas of the endpoint, of a GPU each."""
    endpoint_hours: float = 720.0
    """Hours for which the endpoint has as many replicas."""
    gpu_dollars: float = 4.10
    """Price of a GPU and hour (p4d.24xlarge on demand in us-east-1, as we last knew it: 32.77 for eight)."""
    float32_tflops: float = 19.5
    """What one GPU can do at most in float32, in which FVD is computed, in 10^12 operations per second (A100: 19.5)."""

    def __post_init__(self) -> None:
        if min(self.num_updates, self.num_clips, self.num_videos, self.num_scored, self.replicas) < 0:
            raise ValueError("numbers of updates, clips, videos and replicas must not be negative")
        if min(self.endpoint_hours, self.gpu_dollars) < 0 or self.float32_tflops <= 0:
            raise ValueError("endpoint_hours and gpu_dollars must not be negative, float32_tflops above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """A model, a batch and a machine. The defaults are the paper's AR-DiT on its eight A800 GPUs."""

    model: Literal["dit", "vae"] = "dit"
    """Which of the two models is trained."""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """Sizes of the AR-DiT."""
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Sizes of the AR-VAE."""
    num_frames: int = 16
    """Frames of a clip; 1 in the AR-VAE's first two stages."""
    micro_batch_size: int = 16
    """Clips per forward pass and GPU."""
    gradient_accumulation: int = 8
    """Forward passes per update."""
    num_gpus: int = 8
    """GPUs that share the work."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the forward and backward pass."""
    activation_checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping their activations."""
    gpu_memory_gib: float = 40.0
    """Memory of one GPU, in GiB; a tenth is left to workspaces and fragmentation."""
    peak_tflops: float = 312.0
    """What one GPU can do at most in this precision, in 10^12 operations per second (A100 and A800: 312 in bf16)."""
    utilisation: float = 0.4
    """Share of the peak that training reaches: an assumption, measure it."""
    bandwidth_gb: float = 200.0
    """Rate at which a GPU exchanges data with the others, in 10^9 bytes per second (A800: 400 in both directions)."""
    work: WorkConfig = field(default_factory=WorkConfig)
    """What the jobs have to do."""

    def __post_init__(self) -> None:
        check_ar_step(self.video_frames, self.work.num_inference_steps, self.work.ar_step, self.dit.num_frames)
        if min(self.num_frames, self.micro_batch_size, self.gradient_accumulation, self.num_gpus) < 1:
            raise ValueError("num_frames, micro_batch_size, gradient_accumulation and num_gpus must be at least 1")
        if min(self.gpu_memory_gib, self.peak_tflops, self.bandwidth_gb) <= 0 or not 0 < self.utilisation <= 1:
            raise ValueError("gpu_memory_gib, peak_tflops and bandwidth_gb must be above 0, utilisation in (0, 1]")

    @property
    def video_frames(self) -> int:
        """Frames of a generated video."""
        return self.dit.num_frames if self.work.num_frames is None else self.work.num_frames

    @property
    def rate(self) -> float:
        """Operations per second of a GPU."""
        return self.peak_tflops * 1e12 * self.utilisation

    @property
    def element_bytes(self) -> int:
        """Size of an element of the activations. Autocast keeps normalisations in float32 on GPUs: not counted."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a forward pass over one micro-batch takes."""

    parameters: int
    flops: float
    """Operations of the forward pass; a multiplication and an addition are two."""
    activations: float
    """Bytes kept for the backward pass."""
    block_activations: float
    """Of these, bytes of one block."""
    block_input: float
    """Bytes of one block's input: what activation checkpointing keeps instead."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """A training step on one GPU under one ZeRO stage."""

    stage: int
    states: float
    """Bytes of weights, gradients, optimizer state and average."""
    bucket: float
    """Bytes of the buffer in which gradients are reduced."""
    activations: float
    """Bytes kept for the backward pass."""
    compute_seconds: float
    exchange_seconds: float
    """Upper bound of the time that exchanging weights and gradients adds: nothing is hidden behind computation."""

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.states + self.bucket + self.activations


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """What a job takes on all GPUs together."""

    name: str
    work: str
    gpu_hours: float


def state_bytes(parameters: int, stage: int, num_gpus: int, precision: str) -> float:
    """Bytes per GPU of weights, gradients, optimizer state and average (Rajbhandari et al., 2020, with the average).

    Stage 0 computes on the float32 weights themselves; the others keep a copy in the type of the computation, and
    gradients of that type.
    """
    weight = gradient = 2 if precision == "bf16" else 4
    match stage:
        case 0:
            return (MASTER_BYTES + 4) * parameters
        case 1:
            return (weight + gradient + MASTER_BYTES / num_gpus) * parameters
        case 2:
            return (weight + (gradient + MASTER_BYTES) / num_gpus) * parameters
        case 3:
            return (weight + gradient + MASTER_BYTES) / num_gpus * parameters
        case _:
            raise ValueError(f"there is no ZeRO stage {stage}")


def bucket_bytes(stage: int, precision: str, elements: int = BUCKET_ELEMENTS) -> float:
    """Bytes per GPU of the buffer in which DeepSpeed collects gradients to reduce them.

    Stages 1 and 3 have it all the time, stage 2 in the backward pass; ``reduce_bucket_size`` sets ``elements``.
    """
    return 0 if stage == 0 else elements * (2 if precision == "bf16" else 4)


def exchanged_bytes(parameters: int, stage: int, num_gpus: int, precision: str, gradient_accumulation: int) -> float:
    """Bytes that a GPU sends in an update, in ring collectives.

    Stages 0 and 1 reduce the gradients once an update, stage 2 after every forward pass, as it keeps no whole ones;
    all three send them to every worker, as DeepSpeed does by default (``use_multi_rank_bucket_allreduce``). Stages 1
    and 2 gather the updated weights once. Stage 3 gathers the weights twice in every pass, and sends each gradient to
    its owner alone.
    """
    size = 4 if precision == "fp32" or stage == 0 else 2
    whole = size * parameters * (num_gpus - 1) / num_gpus
    match stage:
        case 0:
            return 2 * whole
        case 1:
            return 3 * whole
        case 2:
            return (2 * gradient_accumulation + 1) * whole
        case 3:
            return 3 * gradient_accumulation * whole
        case _:
            raise ValueError(f"there is no ZeRO stage {stage}")


def count_step(config: EstimateConfig) -> StepCounts:
    """Counts operations and activations of a forward pass over one micro-batch, with its mean squared error."""
    sizes: AutoencoderConfig | DiTConfig = config.dit if config.model == "dit" else config.vae
    one, two = (_count(config, dataclasses.replace(sizes, depth=depth)) for depth in (1, 2))
    parameters, flops, activations = (a + (b - a) * (sizes.depth - 1) for a, b in zip(one, two, strict=True))
    frames = config.micro_batch_size * config.num_frames
    if config.model == "dit":
        block_inputs, tokens = 1, config.dit.num_tokens
    else:
        block_inputs, tokens = 2, (config.vae.resolution // config.vae.patch_size) ** 2 + config.vae.num_tokens
    block_input = float(block_inputs * frames * tokens * sizes.width * config.element_bytes)
    return StepCounts(int(parameters), flops, activations, two[2] - one[2], block_input)


def estimate(config: EstimateConfig) -> list[StageEstimate]:
    """Memory per GPU and time of an update under every ZeRO stage."""
    counts = count_step(config)
    sizes: AutoencoderConfig | DiTConfig = config.dit if config.model == "dit" else config.vae
    activations, passes = counts.activations, 3.0  # the backward pass takes twice the operations of the forward
    if config.activation_checkpointing:
        rest = counts.activations - sizes.depth * counts.block_activations
        activations = rest + sizes.depth * counts.block_input + counts.block_activations
        passes = 4.0
    compute = passes * counts.flops * config.gradient_accumulation / config.rate
    found = []
    for stage in STAGES:
        states = state_bytes(counts.parameters, stage, config.num_gpus, config.precision)
        sent = exchanged_bytes(
            counts.parameters, stage, config.num_gpus, config.precision, config.gradient_accumulation
        )
        bucket, exchange = bucket_bytes(stage, config.precision), sent / (config.bandwidth_gb * 1e9)
        found.append(StageEstimate(stage, states, bucket, activations, compute, exchange))
    return found


def recommended(config: EstimateConfig, stages: list[StageEstimate]) -> StageEstimate | None:
    """The stage to choose: the fastest of those that fit in nine tenths of the memory, the lower on a tie."""
    room = 0.9 * config.gpu_memory_gib * 2**30
    fitting = [s for s in stages if s.memory <= room]
    return min(fitting, key=lambda s: (s.compute_seconds + s.exchange_seconds, s.stage), default=None)


def training_gpu_hours(config: EstimateConfig) -> float | None:
    """GPU hours of all updates under the recommended stage, at most (see ``exchange_seconds``); None if none fits."""
    choice = recommended(config, estimate(config))
    if choice is None:
        return None
    return config.work.num_updates * (choice.compute_seconds + choice.exchange_seconds) * config.num_gpus / 3600


def video_flops(config: EstimateConfig) -> float:
    """Operations of a generated video: evaluations of frames by the AR-DiT, and the AR-VAE's decoder."""
    work, frames = config.work, config.video_frames
    model = dataclasses.replace(config, model="dit", num_frames=config.dit.num_frames)
    of_a_frame = count_step(model).flops / model.micro_batch_size / model.num_frames
    params = SamplingParams(
        num_frames=frames,
        num_inference_steps=work.num_inference_steps,
        ar_step=work.ar_step,
        guidance_scale=2.0 if work.guided else 1.0,
    )
    return frame_evaluations(params, model.num_frames) * of_a_frame + frames * _decoder_flops(config.vae)


def estimate_jobs(config: EstimateConfig) -> list[JobEstimate]:
    """GPU hours of training and, for the AR-DiT, of what goes before and after it."""
    work, found = config.work, []
    if (training := training_gpu_hours(config)) is not None:
        found.append(JobEstimate(f"train-{config.model}", f"{work.num_updates} updates", training))
    if config.model == "vae":
        return found
    encoding, video = config.num_frames * _encoder_flops(config.vae), video_flops(config)
    clips = f"{work.num_clips} clips of {config.num_frames} frames"
    found.append(JobEstimate("encode", clips, work.num_clips * encoding / config.rate / 3600))
    videos = f"{work.num_videos} videos of {config.video_frames} frames, {work.num_inference_steps} steps"
    found.append(JobEstimate("sweep", videos, work.num_videos * video / config.rate / 3600))
    scoring = work.num_scored * _i3d_flops() / (work.float32_tflops * 1e12 * config.utilisation)
    found.append(JobEstimate("evaluate", f"{work.num_scored} clips of {SCORED_FRAMES} frames", scoring / 3600))
    most = work.replicas * 3600 * config.rate / video
    endpoint = f"replicas: {work.replicas}, for {work.endpoint_hours:g} hours; at most {most:.0f} such videos an hour"
    return [*found, JobEstimate("endpoint", endpoint, work.replicas * work.endpoint_hours)]


def run(config: EstimateConfig) -> None:
    """Prints the tables."""
    counts, stages = count_step(config), estimate(config)
    choice = recommended(config, stages)
    print(
        f"{counts.parameters / 1e6:.1f} M parameters, {counts.flops / 1e12:.2f} TFLOP forward and "
        f"{counts.activations / 2**30:.1f} GiB of activations per micro-batch of {config.micro_batch_size}"
    )
    print("ZeRO stage   states GiB   bucket GiB   activations GiB   all GiB   compute s   exchange s (at most)")
    for s in stages:
        mark = "  <- choose" if s == choice else ""
        print(
            f"{s.stage:10d} {s.states / 2**30:12.1f} {s.bucket / 2**30:12.1f} {s.activations / 2**30:17.1f} "
            f"{s.memory / 2**30:9.1f} {s.compute_seconds:11.2f} {s.exchange_seconds:12.2f}{mark}"
        )
    if choice is None:
        print("No stage fits: set activation_checkpointing=true, a smaller micro_batch_size, or offload the optimizer.")
    print(f"{'job':<10} {'what it does':<60} {'GPU hours':>10} {'dollars':>8}")
    for job in estimate_jobs(config):
        print(f"{job.name:<10} {job.work:<60} {job.gpu_hours:10.2f} {job.gpu_hours * config.work.gpu_dollars:8.2f}")


def _encoder_flops(sizes: AutoencoderConfig) -> float:
    """Operations of encoding a frame."""
    side = sizes.resolution
    return _at_depth(sizes, lambda model: model.encode(torch.zeros(1, 1, 3, side, side)))


def _decoder_flops(sizes: AutoencoderConfig) -> float:
    """Operations of decoding a frame: the mean over a clip that fills the decoder's window."""
    shape = (1, sizes.temporal_window, sizes.num_tokens, sizes.token_dim)
    return _at_depth(sizes, lambda model: model.decode(torch.zeros(shape))) / sizes.temporal_window


def _at_depth(sizes: AutoencoderConfig, call: Callable[[ARAutoencoder], object]) -> float:
    """Operations of the call, drawn out from models of one and two blocks."""
    with FakeTensorMode():
        small = [ARAutoencoder(dataclasses.replace(sizes, depth=depth)).eval() for depth in (1, 2)]
        one, two = (_operations(functools.partial(call, model)) for model in small)
    return one + (two - one) * (sizes.depth - 1)


def _i3d_flops() -> float:
    """Operations of a clip's features."""
    with FakeTensorMode():
        network, clip = I3D(), torch.zeros(1, 3, SCORED_FRAMES, 224, 224)
        return _operations(lambda: network(clip))


def _operations(call: Callable[[], object]) -> float:
    with FlopCounter() as counter:
        call()
    return float(counter.total)


def _count(config: EstimateConfig, sizes: AutoencoderConfig | DiTConfig) -> tuple[float, float, float]:
    """Parameters, operations of a forward pass, and bytes it keeps, of a model whose tensors have no memory."""
    with FakeTensorMode():
        model: nn.Module = DiT(sizes) if isinstance(sizes, DiTConfig) else ARAutoencoder(sizes)
        flops, kept = count_forward(model, config.micro_batch_size, config.num_frames)
    return float(sum(p.numel() for p in model.parameters())), float(flops), kept * config.element_bytes / 4


def count_forward(model: nn.Module, batch_size: int, num_frames: int) -> tuple[int, int]:
    """Operations of a forward pass of an AR-DiT or AR-VAE with its loss, and bytes of float32 kept for the backward."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with FlopCounter() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if isinstance(model, DiT):
            shape = (batch_size, num_frames, model.config.num_tokens, model.config.token_dim)
            timesteps = torch.zeros(batch_size, num_frames, dtype=torch.int64)
            target = torch.zeros(shape)
            output = model(torch.zeros(shape), timesteps, timesteps[:, 0])
        else:
            assert isinstance(model, ARAutoencoder)
            side = model.config.resolution
            target = torch.zeros(batch_size, num_frames, 3, side, side)
            noise = torch.zeros(batch_size, num_frames, model.config.num_tokens, model.config.token_dim)
            output, _ = model(target, noise, temporal=num_frames > 1)
        nn.functional.mse_loss(output, target)
    return counter.total, sum(storage.nbytes() for storage in kept.values())
