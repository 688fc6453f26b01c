"""Memory and time of a training step under each ZeRO stage, from formulas (Rajbhandari et al., 2020)."""

from dataclasses import dataclass

from ardiff.train.estimate.config import EstimateConfig
from ardiff.train.estimate.counts import count_step

STAGES = (0, 1, 2, 3)
MASTER_BYTES = 16
"""Bytes per parameter of weight, two moments and EMA in float32."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``; ``train.deepspeed.raw`` can change it."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """A training step on one GPU under one ZeRO stage."""

    stage: int
    states: float
    """Bytes of weights, gradients, optimizer state and EMA."""
    bucket: float
    """Bytes of the buffer that reduces gradients."""
    activations: float
    """Bytes kept for the backward pass."""
    compute_seconds: float
    exchange_seconds: float
    """Upper bound of the time to exchange weights and gradients, as if nothing overlapped with computation."""

    @property
    def memory(self) -> float:
        """Bytes in total."""
        return self.states + self.bucket + self.activations

    @property
    def seconds(self) -> float:
        """Upper bound of the time of an update."""
        return self.compute_seconds + self.exchange_seconds


def state_bytes(parameters: int, stage: int, num_gpus: int, precision: str) -> float:
    """Bytes per GPU of weights, gradients, optimizer state and EMA.

    Stage 0 computes with the float32 weights. The other stages keep a copy of the weights, and the gradients, in the
    precision of the computation.
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

    Stages 1 and 3 always hold it, stage 2 during the backward pass. ``reduce_bucket_size`` sets ``elements``.
    """
    return 0 if stage == 0 else elements * (2 if precision == "bf16" else 4)


def exchanged_bytes(parameters: int, stage: int, num_gpus: int, precision: str, gradient_accumulation: int) -> float:
    """Bytes that a GPU sends per update in ring collectives.

    Stages 0 and 1 reduce gradients once per update. Stage 2 shards them, so it reduces them after every forward pass.
    All three send them to every rank, DeepSpeed's default (``use_multi_rank_bucket_allreduce``). Stages 1 and 2 gather
    the updated weights once. Stage 3 gathers the weights twice per pass, and sends each gradient to its owner only.
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


def estimate_stages(config: EstimateConfig) -> list[StageEstimate]:
    """Memory per GPU and time of an update under every ZeRO stage."""
    counts, depth = count_step(config), config.sizes.depth
    activations, passes = counts.activations, 3.0  # the backward pass takes twice the operations of the forward pass
    if config.activation_checkpointing:
        outside_blocks = counts.activations - depth * counts.block_activations
        activations = outside_blocks + depth * counts.block_input + counts.block_activations
        passes = 4.0
    compute = passes * counts.flops * config.gradient_accumulation / config.rate
    estimates = []
    for stage in STAGES:
        states = state_bytes(counts.parameters, stage, config.num_gpus, config.precision)
        sent = exchanged_bytes(
            counts.parameters, stage, config.num_gpus, config.precision, config.gradient_accumulation
        )
        bucket, exchange = bucket_bytes(stage, config.precision), sent / (config.bandwidth_gb * 1e9)
        estimates.append(StageEstimate(stage, states, bucket, activations, compute, exchange))
    return estimates


def recommended(config: EstimateConfig, stages: list[StageEstimate]) -> StageEstimate | None:
    """The fastest stage that fits into nine tenths of the memory, the lower one on a tie; None if none fits."""
    limit = 0.9 * config.gpu_memory_gib * 2**30
    fitting = [stage for stage in stages if stage.memory <= limit]
    return min(fitting, key=lambda stage: (stage.seconds, stage.stage), default=None)
