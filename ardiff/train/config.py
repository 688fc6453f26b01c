"""Settings of the optimisation: optimizer, batch, engine, checkpoints."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ardiff.config import to_dict
from ardiff.train.engines.config import DeepSpeedConfig, Linear, Precision

Tracker = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon`` orthogonalises the updates of the matrices inside blocks (Jordan et al., 2024) and uses AdamW for all
    other parameters. On small models it needs several times fewer steps."""
    lr: float = 2e-4
    """Learning rate of AdamW."""
    muon_lr: float = 1e-2
    """Learning rate of Muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW and Muon."""
    beta1: float = 0.9
    """First moment decay of AdamW."""
    beta2: float = 0.99
    """Second moment decay of AdamW."""
    schedule: Literal["constant", "drop", "cosine"] = "constant"
    """Learning rate after the warm-up. ``constant``; ``drop``: constant, then constant at ``drop_factor`` times the
    rate; ``cosine``: half a cosine down to a hundredth at the last step."""
    drop_step: int = 100_000
    """First step (0-based) of the second phase of ``drop``."""
    drop_factor: float = 0.05
    """Learning rate of the second phase of ``drop`` relative to the first. Sec. 4.1 drops from 2e-4 to 1e-5."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.muon_lr <= 0:
            raise ValueError("lr and muon_lr must be above 0")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps and weight_decay must not be negative")
        if self.drop_step < 0 or self.drop_factor <= 0:
            raise ValueError("drop_step must not be negative, and drop_factor must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run, whatever the task."""

    num_steps: int = 100_000
    """Updates of the weights."""
    batch_size: int = 16
    """Clips per update, summed over all workers."""
    num_workers: int = 1
    """Workers that share every batch, each on a GPU of its own if there are GPUs. Data order and noise do not depend on
    this number."""
    min_workers: int = 0
    """Elastic training: start with at least this many workers, and use as many as the cluster has room for, up to
    ``num_workers``. 0 waits for exactly ``num_workers``."""
    resize_interval: float = 60.0
    """Elastic training: seconds between checks for room for more workers. Adding workers repeats the steps since the
    last checkpoint."""
    max_failures: int = 2
    """How many failed attempts, such as lost workers or nodes, training survives. It resumes from the last checkpoint
    each time. -1 for any number, for example on spot machines. Preemptions with a notice do not count."""
    gradient_accumulation: int = 1
    """Micro-batches per update and worker. More of them need less memory. The update is the same except in the AR-VAE's
    adversarial stage, where each micro-batch has its own adaptive weight."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations: less memory, a third more compute."""
    engine: Literal["torch", "fsdp", "deepspeed"] = "torch"
    """``torch``: every worker holds all weights and optimizer state. ``fsdp``: torch's fully_shard (FSDP2) shards
    weights, gradients, optimizer state and EMA over the workers. ``deepspeed``: ZeRO shards them, as far as its stage
    says; AdamW only."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Settings of the engine ``deepspeed``."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average (EMA) of the weights, which is what is exported."""
    precision: Precision = "fp32"
    """Precision of the forward pass. The updated weights and the optimizer stay float32; fp16 scales the loss
    dynamically. DeepSpeed (stages 1 to 3) computes with a copy of the weights in this precision."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses a GPU if there is one."""
    linear: Linear = "torch"
    """What computes linear layers in float32 on CPUs. ``onednn`` (engine ``torch`` only) equals torch up to rounding,
    and is faster on some processors. ``auto`` takes what is faster here, by a measurement whose result is kept in the
    cache folder. Without oneDNN in torch, all of them are ``torch``."""
    cpu_threads: int = 2
    """Threads of a CPU worker, which is also the number of CPUs that it requests from Ray."""
    loading_tasks: int = 2
    """Ray Data tasks per worker that load batches in parallel. They share the machine's CPUs with a CPU worker."""
    seed: int = 0
    """Seed of initial weights, data order and training noise."""
    log_every: int = 50
    """Steps between log entries."""
    checkpoint_every: int = 1000
    """Steps between checkpoints. The last step always writes one."""
    async_checkpoints: bool = True
    """Training waits until a checkpoint is copied to host memory; a thread writes and uploads it. At most one is under
    way. False: training waits until it is stored."""
    sample_every: int = 0
    """Steps between sample sheets; 0 writes none."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep; the best one is kept as well."""
    save_patience: int = 3
    """Consecutive checkpoints that may fail to be stored before training stops."""
    max_loss_ratio: float = 20.0
    """Stop before an update whose loss exceeds this many times the median of the last 100 steps; 0 disables the check.
    The 100 steps start again when training starts or resumes and at the start of a stage. The check is off while the
    median is not positive and in the adversarial stage, whose adaptive weight rescales the loss."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where to log values and sample sheets: ``tensorboard``, ``wandb``, ``mlflow``."""
    project: str = "ardiff"
    """The project of Weights & Biases, and the experiment of MLflow."""
    profile: int = 0
    """Steps to trace with torch's profiler after every start, from the eleventh step on; 0 traces none. The traces of
    all workers are written to ``profile`` in the run's folder."""
    peak_tflops: float = 0.0
    """Peak of one worker's device in 10^12 operations per second at this precision, to log the utilisation ``mfu``;
    0 if unknown."""

    def __post_init__(self) -> None:
        names = ("num_steps", "batch_size", "num_workers", "gradient_accumulation", "cpu_threads", "loading_tasks")
        if min(getattr(self, name) for name in names) < 1:
            raise ValueError(f"{', '.join(names)} must be at least 1")
        if min(self.log_every, self.checkpoint_every) < 1 or self.sample_every < 0:
            raise ValueError("log_every and checkpoint_every must be at least 1, sample_every 0 or more")
        if not 0.0 <= self.ema_decay < 1.0 or self.max_grad_norm <= 0:
            raise ValueError("ema_decay must be in [0, 1) and max_grad_norm above 0")
        if len(set(self.trackers)) < len(self.trackers) or not self.project:
            raise ValueError("trackers must differ, and project must not be empty")
        if self.profile < 0:
            raise ValueError("profile must be 0 or more")
        if min(self.keep_checkpoints, self.save_patience + 1) < 1:
            raise ValueError("keep_checkpoints must be at least 1 and save_patience 0 or more")
        if self.peak_tflops < 0 or (self.max_loss_ratio and self.max_loss_ratio <= 1):
            raise ValueError("peak_tflops must not be negative, and max_loss_ratio 0 or above 1")
        self._check_workers()
        self._check_engine()

    def _check_workers(self) -> None:
        if not 0 <= self.min_workers <= self.num_workers or self.max_failures < -1 or self.resize_interval < 0:
            raise ValueError("min_workers must be 0 to num_workers, max_failures -1 or more, resize_interval 0 or more")
        micro_batches = self.num_workers * self.gradient_accumulation
        needed = "at least" if self.min_workers else "a multiple of"
        if self.batch_size < micro_batches if self.min_workers else self.batch_size % micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} must be {needed} gradient_accumulation {self.gradient_accumulation} "
                f"times num_workers {self.num_workers}"
            )

    def _check_engine(self) -> None:
        if self.engine == "deepspeed" and self.optimizer.name != "adamw":
            raise ValueError(
                f"engine=deepspeed needs optimizer.name=adamw, not {self.optimizer.name}: ZeRO shards matrices into "
                "flat pieces, which Muon cannot orthogonalise; use adamw, or engine=torch"
            )
        if self.linear != "torch" and self.engine != "torch":
            raise ValueError(f"linear={self.linear} needs engine=torch")
        if self.deepspeed != DeepSpeedConfig() and self.engine != "deepspeed":
            raise ValueError("the settings of deepspeed are for engine=deepspeed")
        if self.engine == "fsdp" and self.precision == "fp16":
            raise ValueError("engine=fsdp does not scale the loss of precision=fp16: use bf16, or engine=deepspeed")
        if self.engine == "deepspeed" and self.deepspeed.stage == 0 and self.precision == "fp16":
            raise ValueError("precision=fp16 under deepspeed needs stage 1, 2 or 3")
        self.deepspeed_settings(self.num_workers)

    @property
    def resume_key(self) -> dict[str, object]:
        """What must not change when training resumes from a checkpoint.

        The number of workers, the engine and the number of micro-batches may change.
        """
        return {**{n: getattr(self, n) for n in ("batch_size", "precision", "seed")}, "optimizer": self.optimizer.name}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Numbers and schedule that shape the updates. They may change only where ``resume`` names a checkpoint.

        The number of steps is one of them only if the schedule depends on it.
        """
        optimizer = {f"optimizer.{name}": value for name, value in to_dict(self.optimizer).items() if name != "name"}
        steps = {"num_steps": self.num_steps} if self.optimizer.schedule == "cosine" else {}
        return {"max_grad_norm": self.max_grad_norm, "ema_decay": self.ema_decay, **optimizer, **steps}

    @property
    def micro_batch_size(self) -> int:
        """Largest number of clips in a worker's forward pass."""
        return math.ceil(self.batch_size / (self.num_workers * self.gradient_accumulation))

    def micro_batches(self, rank: int, size: int) -> list[range]:
        """The indices in a batch of the samples of ``rank`` among ``size`` ranks, one range per forward pass.

        With fewer ranks than ``num_workers`` there are more micro-batches, not larger ones. All ranks have equally
        many. If the batch cannot be divided evenly, ranks, and micro-batches of a rank, differ by at most one sample.
        """
        largest, smallest = math.ceil(self.batch_size / size), self.batch_size // size
        count = min(math.ceil(largest / self.micro_batch_size), smallest)
        first, end = (r * self.batch_size // size for r in (rank, rank + 1))
        bounds = [first + (end - first) * i // count for i in range(count + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def deepspeed_settings(self, size: int) -> dict[str, Any]:
        """DeepSpeed's own configuration for ``size`` ranks.

        Raises ValueError if ``deepspeed.raw`` contradicts the other settings.
        """
        count = len(self.micro_batches(0, size))
        return self.deepspeed.settings(self.micro_batch_size, count, self.max_grad_norm, self.precision)
