"""The one training loop. What is trained is a task's affair, how weights change an engine's, where data comes from
and where checkpoints go the caller's."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from ardiff.config import to_dict
from ardiff.errors import TrainingError
from ardiff.randomness import torch_generator
from ardiff.train.checkpoint import TrainState
from ardiff.train.engine import Engine
from ardiff.train.optim import OptimizerConfig, learning_rate_factor
from ardiff.train.tasks import Batch, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, in what portions and on what to train."""

    num_steps: int = 100_000
    """Updates of the weights."""
    batch_size: int = 16
    """Clips per update."""
    gradient_accumulation: int = 1
    """Parts into which a batch is cut to save memory; the update is the same."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.9999
    """Decay of the average of the weights, which is what is exported."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimizer stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""
    cpu_threads: int = 2
    """Threads of a CPU worker, which is also the CPUs it asks Ray for."""
    loading_tasks: int = 2
    """Ray Data tasks that load batches at the same time; they share the machine's CPUs with a CPU worker."""
    seed: int = 0
    """Seed of initial weights, data order and training noise."""
    log_every: int = 50
    """Steps between logged losses."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always one."""
    sample_every: int = 0
    """Steps between sample sheets; 0 makes none."""

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch_size, self.gradient_accumulation, self.cpu_threads, self.loading_tasks) < 1:
            raise ValueError(
                "num_steps, batch_size, gradient_accumulation, cpu_threads and loading_tasks must be at least 1"
            )
        if min(self.log_every, self.checkpoint_every) < 1 or self.sample_every < 0:
            raise ValueError("log_every and checkpoint_every must be at least 1, sample_every 0 or more")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of gradient_accumulation {self.gradient_accumulation}"
            )
        if not 0.0 <= self.ema_decay < 1.0 or self.max_grad_norm <= 0:
            raise ValueError("ema_decay must be in [0, 1) and max_grad_norm above 0")

    @property
    def recipe(self) -> dict[str, object]:
        """What must not change when training goes on from a checkpoint: all that shapes the updates.

        The number of steps belongs to it only under a schedule that depends on it.
        """
        names = ("batch_size", "gradient_accumulation", "max_grad_norm", "ema_decay", "precision", "seed")
        steps = self.num_steps if self.optimizer.schedule == "cosine" else None
        return {**{n: getattr(self, n) for n in names}, "optimizer": to_dict(self.optimizer), "num_steps": steps}

    @property
    def micro_batch_size(self) -> int:
        """Clips per forward pass."""
        return self.batch_size // self.gradient_accumulation


class Observer(Protocol):
    """Hears of what happens in training. All steps are counts of updates made."""

    def progress(self, step: int, loss: float) -> None:
        """After every update."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Every ``log_every`` steps."""

    def samples(self, step: int, videos: Tensor) -> None:
        """Every ``sample_every`` steps: uint8 ``(B, F, H, W, 3)``."""

    def checkpoint(self, state: TrainState) -> None:
        """When a checkpoint is due; the engine holds its content."""


def train(
    task: Task,
    engine: Engine,
    batches: Iterator[Batch],
    config: TrainConfig,
    start: TrainState,
    observer: Observer,
    clock: Callable[[], float] = time.monotonic,
    critic: Engine | None = None,
) -> TrainState:
    """Trains from ``start`` to ``config.num_steps``.

    Args:
        batches: Micro-batches from position ``start.samples`` of the data on, on any device.
        start: Where training is; step 0 for a fresh run.
        critic: The engine of ``task.critic``, for a task that has one.

    Returns:
        The final state.

    Raises:
        TrainingError: The loss or the gradient is not finite, before any weight is changed by it; or the data ends.
    """
    task.model.train()
    if task.critic is not None:
        task.critic.train()
    step, seen, last = start.step, 0, clock()
    while step < config.num_steps:
        rival = critic if step >= task.critic_from_step else None
        total, parts = _accumulate(task, engine, rival, batches, config, step)
        factor = learning_rate_factor(config.optimizer, step, config.num_steps)
        norm = engine.step(step, factor)
        _check_gradient(norm, "", step)
        if rival is not None:
            parts["critic_grad_norm"] = rival.step(step, factor)
            _check_gradient(parts["critic_grad_norm"], "critic's ", step)
        step, seen = step + 1, seen + 1
        observer.progress(step, total)
        if step % config.log_every == 0 or step == config.num_steps:
            rate = seen * config.batch_size / max(clock() - last, 1e-9)
            seen, last = 0, clock()
            values = {"loss": total, "grad_norm": norm, "lr_factor": factor, "samples_per_second": rate}
            observer.metrics(step, {**values, **parts})
        due = config.sample_every and (step % config.sample_every == 0 or step == config.num_steps)
        if due and (videos := task.samples(averaged_model(engine))) is not None:
            observer.samples(step, videos)
        if step % config.checkpoint_every == 0 or step == config.num_steps:
            observer.checkpoint(TrainState(step, step * config.batch_size, start.fingerprint))
    return TrainState(step, step * config.batch_size, start.fingerprint)


def averaged_model(engine: Engine) -> torch.nn.Module:
    """A copy of the engine's model with the averaged weights, for evaluation."""
    model = copy.deepcopy(engine.model)
    model.load_state_dict(engine.averaged_weights(), strict=True)
    return model.eval()


def _check_gradient(norm: float, whose: str, step: int) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"The {whose}gradient is not finite at step {step}: lower the learning rate, or check the data. "
            "The weights were not changed by it, and the last checkpoint is good."
        )


def _check_loss(value: float, whose: str, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"The {whose}loss is {value} at step {step}: lower the learning rate, or check the data. "
            "No weight was changed by it, and the last checkpoint is good."
        )


def _accumulate(
    task: Task, engine: Engine, critic: Engine | None, batches: Iterator[Batch], config: TrainConfig, step: int
) -> tuple[float, dict[str, float]]:
    """Gradients of one batch, part by part; returns the mean loss and the means of its logged parts."""
    share = 1.0 / config.gradient_accumulation
    total, means = 0.0, dict[str, float]()
    for part in range(config.gradient_accumulation):
        batch = next(batches, None)
        if batch is None:
            raise TrainingError(f"The data ended at step {step} of {config.num_steps}.")
        generator = torch_generator("training", config.seed, step, part)
        with engine.autocast():
            loss, logged = task.loss({k: v.to(engine.device) for k, v in batch.items()}, step, generator)
        _check_loss(value := float(loss.detach()), "", step)
        engine.backward(loss * share)
        total += share * value
        if critic is not None:
            with critic.autocast():
                critic_loss, critic_logged = task.critic_loss()
            _check_loss(float(critic_loss.detach()), "critic's ", step)
            critic.backward(critic_loss * share)
            logged = {**logged, **critic_logged, "critic_loss": critic_loss}
        for name, tensor in logged.items():
            means[name] = means.get(name, 0.0) + share * float(tensor.detach())
    return total, means
