"""The one training loop. What is trained is a task's affair, how weights change an engine's, where data comes from
and where checkpoints go the caller's."""

import contextlib
import copy
import functools
import itertools
import math
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ardiff import distributed, onednn
from ardiff.config import to_dict
from ardiff.errors import ArdiffError, ConfigError, TrainingError
from ardiff.randomness import BatchGenerator, torch_generator
from ardiff.train.checkpoint import TrainState
from ardiff.train.engine import DeepSpeedConfig, Engine, Precision, TorchEngine, deepspeed_settings
from ardiff.train.flops import FlopCounter
from ardiff.train.optim import OptimizerConfig, learning_rate_factor
from ardiff.train.profiling import Tracer
from ardiff.train.tasks import Batch, Task

SPIKE_WINDOW = 100
"""Steps whose median loss a spike is measured against."""
LARGEST = ("data_wait_share", "memory_gib")
"""Measures that are the largest of any worker."""
SHARES = "share out more with train.engine=deepspeed and a higher train.deepspeed.stage"
SMALLER_PARTS = f"raise train.gradient_accumulation, set train.activation_checkpointing=true, or {SHARES}"
"""What to do when memory runs out."""
MAX_OVERFLOWS = 50
"""Steps in a row whose gradients may be too large for fp16 before training stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, in what portions and on what to train."""

    num_steps: int = 100_000
    """Updates of the weights."""
    batch_size: int = 16
    """Clips per update, of all workers together."""
    num_workers: int = 1
    """Workers that share every batch, one GPU each if there are GPUs. The order of the data and the noise do not depend
    on it."""
    min_workers: int = 0
    """Elastic training: begin with as few workers as this, and go on with as many as the cluster has room for, up to
    ``num_workers``; 0 waits for exactly ``num_workers``."""
    resize_interval: float = 60.0
    """Elastic training: seconds between looks for room for more workers; taking them in costs the steps since the last
    checkpoint."""
    max_failures: int = 2
    """How often workers or their nodes may be lost; each time training goes on from the last checkpoint. -1 for any
    number, as on machines that may be taken away at any time."""
    gradient_accumulation: int = 1
    """Parts into which a worker cuts its share of a batch to save memory; the update is the same, but in the AR-VAE's
    adversarial stage, where every part has its own adaptive weight."""
    activation_checkpointing: bool = False
    """Compute the blocks again in the backward pass instead of keeping their activations: less memory, a third more
    work."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """``torch``: every worker holds weights and optimizer. ``deepspeed``: workers share them out (ZeRO); AdamW only."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Of the engine ``deepspeed``."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.9999
    """Decay of the average of the weights, which is what is exported."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass. The weights that are updated stay float32, as does the optimizer; fp16 scales the
    loss as its gradients need it. DeepSpeed (stages 1 to 3) computes with a copy of the weights in this precision."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""
    onednn: bool = False
    """On CPUs, compute linear layers by oneDNN in float32 (engine ``torch`` only): the same but for rounding, and
    faster where MKL is slow, as on AMD processors. A torch without oneDNN computes as usual."""
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
    keep_checkpoints: int = 2
    """Checkpoints kept: the last ones, beside the best one."""
    save_patience: int = 3
    """Checkpoints in a row that may fail to be stored before training stops."""
    max_loss_ratio: float = 20.0
    """Stop before a step whose loss is this many times the median of the last hundred; 0 never does. The hundred begin
    anew when training starts and where a stage begins. A loss that an adaptive weight scales, in the adversarial stage,
    is no measure, nor is a median that is not positive: then no step stops."""
    wandb_project: str = ""
    """Project of Weights & Biases to log to as well, with the wandb package and its own settings; empty for none."""
    profile: int = 0
    """Steps to trace with torch's profiler after every start, from the eleventh on: a trace of each worker is put into
    ``profile`` in the run's folder; 0 traces none."""
    peak_tflops: float = 0.0
    """What one worker's device can do at most, in 10^12 operations per second at the given precision, to log the share
    of it that is used (``mfu``); 0 if unknown."""

    def __post_init__(self) -> None:
        names = ("num_steps", "batch_size", "num_workers", "gradient_accumulation", "cpu_threads", "loading_tasks")
        if min(getattr(self, name) for name in names) < 1:
            raise ValueError(f"{', '.join(names)} must be at least 1")
        if min(self.log_every, self.checkpoint_every) < 1 or self.sample_every < 0:
            raise ValueError("log_every and checkpoint_every must be at least 1, sample_every 0 or more")
        if not 0 <= self.min_workers <= self.num_workers or self.max_failures < -1 or self.resize_interval < 0:
            raise ValueError("min_workers must be 0 to num_workers, max_failures -1 or more, resize_interval 0 or more")
        if self.min_workers and self.batch_size < self.num_workers * self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} must be at least gradient_accumulation {self.gradient_accumulation} "
                f"times num_workers {self.num_workers}"
            )
        if not self.min_workers and self.batch_size % (self.num_workers * self.gradient_accumulation):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of gradient_accumulation {self.gradient_accumulation}"
                f" times num_workers {self.num_workers}"
            )
        if not 0.0 <= self.ema_decay < 1.0 or self.max_grad_norm <= 0:
            raise ValueError("ema_decay must be in [0, 1) and max_grad_norm above 0")
        if self.engine == "deepspeed" and self.optimizer.name != "adamw":
            raise ValueError(
                f"engine=deepspeed works with optimizer.name=adamw only, not {self.optimizer.name}: ZeRO cuts matrices "
                "into flat pieces, which Muon cannot orthogonalise; take adamw, or engine=torch"
            )
        if self.onednn and self.engine != "torch":
            raise ValueError("onednn=true works with engine=torch only")
        if self.deepspeed != DeepSpeedConfig() and self.engine != "deepspeed":
            raise ValueError("the settings of deepspeed are for engine=deepspeed")
        if self.engine == "deepspeed" and self.deepspeed.stage == 0 and self.precision == "fp16":
            raise ValueError("precision=fp16 under deepspeed needs stage 1, 2 or 3")
        if self.profile < 0:
            raise ValueError("profile must be 0 or more")
        if min(self.keep_checkpoints, self.save_patience + 1) < 1:
            raise ValueError("keep_checkpoints must be at least 1 and save_patience 0 or more")
        if self.peak_tflops < 0 or (self.max_loss_ratio and self.max_loss_ratio <= 1):
            raise ValueError("peak_tflops must not be negative, and max_loss_ratio 0 or above 1")
        self.deepspeed_settings(self.num_workers)

    @property
    def recipe(self) -> dict[str, object]:
        """What must not change when training goes on from a checkpoint.

        Number of workers, engine and parts of a batch may change.
        """
        return {**{n: getattr(self, n) for n in ("batch_size", "precision", "seed")}, "optimizer": self.optimizer.name}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The numbers, and the schedule, that shape the updates; they may change where ``resume`` names a checkpoint.

        The number of steps is one only under a schedule that depends on it.
        """
        optimizer = {f"optimizer.{name}": value for name, value in to_dict(self.optimizer).items() if name != "name"}
        steps = {"num_steps": self.num_steps} if self.optimizer.schedule == "cosine" else {}
        return {"max_grad_norm": self.max_grad_norm, "ema_decay": self.ema_decay, **optimizer, **steps}

    @property
    def micro_batch_size(self) -> int:
        """Clips per forward pass of a worker, at most."""
        return math.ceil(self.batch_size / (self.num_workers * self.gradient_accumulation))

    def parts(self, rank: int, size: int) -> list[range]:
        """The places in a batch of the samples of worker ``rank`` of ``size``, a range for each forward pass.

        With fewer workers than ``num_workers`` there are more parts, not larger ones. All workers have equally many,
        and shares of which one may be a sample larger than another where the batch cannot be divided evenly.
        """
        largest, smallest = math.ceil(self.batch_size / size), self.batch_size // size
        count = min(math.ceil(largest / self.micro_batch_size), smallest)
        first, end = (r * self.batch_size // size for r in (rank, rank + 1))
        bounds = [first + (end - first) * part // count for part in range(count + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def deepspeed_settings(self, size: int) -> dict[str, object]:
        """DeepSpeed's own configuration for ``size`` workers.

        Raises ValueError if its raw section contradicts the settings here.
        """
        parts = len(self.parts(0, size))
        return deepspeed_settings(self.deepspeed, self.micro_batch_size, parts, self.max_grad_norm, self.precision)


def make_engine(
    model: nn.Module, config: TrainConfig, device: torch.device, optimizer: OptimizerConfig | None = None
) -> Engine:
    """The configured engine for ``model``; under DeepSpeed the process group has to be there.

    Args:
        optimizer: That of ``config`` if not given.
    """
    shared = (config.precision, config.max_grad_norm, config.ema_decay)
    optimizer = optimizer or config.optimizer
    match config.engine:
        case "torch":
            engine = TorchEngine(
                model, optimizer, device, *shared, activation_checkpointing=config.activation_checkpointing
            )
            if config.onednn and device.type == "cpu" and onednn.available():
                onednn.accelerate_linear(model)
            return engine
        case "deepspeed":
            if device.type == "cpu":
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            try:
                from ardiff.train.deepspeed_engine import DeepSpeedEngine
            except ModuleNotFoundError as error:
                raise ConfigError("train.engine=deepspeed needs DeepSpeed: pip install 'ardiff[deepspeed]'.") from error
            settings = config.deepspeed_settings(distributed.size())
            return DeepSpeedEngine(
                model, optimizer, device, *shared, settings, activation_checkpointing=config.activation_checkpointing
            )
        case _:
            raise ValueError(f"unknown engine {config.engine!r}")


def make_critic_engine(critic: nn.Module, config: TrainConfig, device: torch.device) -> Engine:
    """The engine of a task's critic: like the model's, but its weights, which the model's loss reads, stay whole."""
    deepspeed = replace(config.deepspeed, stage=min(config.deepspeed.stage, 2), offload_parameters=False)
    return make_engine(critic, replace(config, deepspeed=deepspeed), device)


class Observer(Protocol):
    """Hears of what happens in training. All steps are counts of updates made."""

    def progress(self, step: int, loss: float) -> None:
        """After every update."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Every ``log_every`` steps."""

    def samples(self, step: int, videos: Tensor) -> None:
        """Every ``sample_every`` steps: uint8 ``(B, F, H, W, 3)``."""

    def checkpoint(self, state: TrainState) -> None:
        """When a checkpoint is due, on every worker; the engine holds its content."""

    def trace(self, content: bytes) -> None:
        """When ``profile`` steps are traced, on every worker: the trace, see :mod:`ardiff.train.profiling`."""


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
    """Trains from ``start`` to ``config.num_steps``; every worker calls it alike.

    Args:
        batches: This worker's micro-batches from position ``start.samples`` of the data on, on any device.
        start: Where training is; step 0 for a fresh run.
        observer: What the first worker's hears of metrics is of all workers.
        critic: The engine of ``task.critic``, for a task that has one.

    Returns:
        The final state.

    Raises:
        TrainingError: The loss or the gradient is not finite or the loss is a spike, before any weight is changed by
            it; memory ran out; or the data ends.
    """
    task.model.train()
    if task.critic is not None:
        task.critic.train()
    meter, tracer = _Meter(config, engine.device, clock), Tracer(config.profile, lambda trace: observer.trace(trace))
    step, recent, overflows = start.step, deque[float](maxlen=SPIKE_WINDOW), 0
    while step < config.num_steps:
        rival = critic if step >= task.critic_from_step else None
        with readable_failures(f"at step {step}"):
            losses, logged = _accumulate(task, engine, rival, batches, config, step, meter)
        loss = sum(losses) / distributed.size()
        if step in task.changes or rival is not None:
            recent.clear()
        _check_loss(losses, step, config, recent)
        if not math.isfinite(logged.get("critic_loss", 0.0)):
            raise TrainingError(
                f"The critic's loss is {logged['critic_loss']} at step {step}, {_batch(step, config)}: lower the "
                "learning rate, or check the data. No weight was changed by it, and the last checkpoint is good."
            )
        recent.append(loss)
        factor = learning_rate_factor(config.optimizer, step, config.num_steps)
        with readable_failures(f"at step {step}"):
            norm = engine.step(step, factor)
            if rival is not None:
                logged["critic_grad_norm"] = rival.step(step, factor)
        overflows = overflows + 1 if not math.isfinite(norm + logged.get("critic_grad_norm", 0.0)) else 0
        if config.precision != "fp16" or overflows > MAX_OVERFLOWS:
            _check_gradient(norm, "", step, config)
            _check_gradient(logged.get("critic_grad_norm", 0.0), "critic's ", step, config)
        step += 1
        tracer.step()
        observer.progress(step, loss)
        if step % config.log_every == 0 or step == config.num_steps:
            rates = {"lr_factor": factor, **engine.learning_rates()}
            if rival is not None:
                rates |= {f"critic_{name}": rate for name, rate in rival.learning_rates().items()}
            observer.metrics(step, {"loss": loss, "grad_norm": norm, **rates, **meter.read(), **logged})
        due = config.sample_every and (step % config.sample_every == 0 or step == config.num_steps)
        if due:
            with readable_failures(f"when it made the samples of step {step}", "set train.sample_every=0"):
                model = averaged_model(engine)
                if model is not None and (videos := task.samples(model)) is not None:
                    observer.samples(step, videos)
        if step % config.checkpoint_every == 0 or step == config.num_steps:
            with readable_failures(f"when it stored the checkpoint of step {step}", SHARES):
                observer.checkpoint(_state(step, config, start))
    tracer.close()
    return _state(step, config, start)


def _state(step: int, config: TrainConfig, start: TrainState) -> TrainState:
    return TrainState(step, step * config.batch_size, start.fingerprint, config.hyperparameters)


def averaged_model(engine: Engine) -> torch.nn.Module | None:
    """A copy of the engine's model with the averaged weights, for evaluation; None on all workers but the first.

    Every worker has to call it.
    """
    weights = engine.averaged_weights()
    if distributed.rank() > 0:
        return None
    model = copy.deepcopy(engine.skeleton)
    model.load_state_dict(
        {name: weight.to(engine.device) for name, weight in weights.items()}, strict=True, assign=True
    )
    return model.to(engine.device).eval()


def _check_gradient(norm: float, whose: str, step: int, config: TrainConfig) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"The {whose}gradient is not finite at step {step}, {_batch(step, config)}: lower the learning rate, or "
            "check the data. The weights were not changed by it, and the last checkpoint is good."
        )


def _accumulate(
    task: Task,
    engine: Engine,
    critic: Engine | None,
    batches: Iterator[Batch],
    config: TrainConfig,
    step: int,
    meter: "_Meter",
) -> tuple[list[float], dict[str, float]]:
    """Gradients of one batch, part by part.

    Returns what each worker's share adds to the loss (their mean is the batch's), and the means over the batch of the
    logged parts.
    """
    size, sums = distributed.size(), dict[str, list[float]]()
    mine = 0.0
    for part in config.parts(distributed.rank(), size):
        with meter.waiting():
            batch = next(batches, None)
        if batch is None:
            raise TrainingError(f"The data ended at step {step} of {config.num_steps}.")
        draws = BatchGenerator(torch_generator("training", config.seed, step, 0), config.batch_size, part.start)
        divisor = config.batch_size / (len(part) * size)  # engines average over workers, so that samples count alike
        on_device = {k: v.to(engine.device) for k, v in batch.items()}
        with meter.counting(len(part), sum(step >= change for change in task.changes)):
            loss, logged = engine.compute(functools.partial(task.loss, on_device, step, draws))
            engine.backward(loss / divisor)
            if critic is not None:
                critic_loss, critic_logged = critic.compute(task.critic_loss)
                critic.backward(critic_loss / divisor)
                logged = {**logged, **critic_logged, "critic_loss": critic_loss}
        mine += float(loss.detach()) / divisor
        for name, tensor in logged.items():
            # A mean is a sum over samples with their number.
            pair = [float(tensor.detach()) * len(part), len(part)] if tensor.ndim == 0 else tensor.tolist()
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0, 0.0]), pair, strict=True)]
    own_place = [mine if rank == distributed.rank() else 0.0 for rank in range(size)]
    total = distributed.sum_over([*own_place, *itertools.chain(*sums.values())], engine.device)
    pairs = zip(sums, total[size::2], total[size + 1 :: 2], strict=True)
    return total[:size], {name: amount / count for name, amount, count in pairs if count}


def _check_loss(losses: list[float], step: int, config: TrainConfig, recent: Sequence[float]) -> None:
    """Raises TrainingError if a worker's loss is not finite, or the batch's is a spike."""
    for rank, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss} at step {step} on worker {rank}, {_batch(step, config, rank)}: lower the learning "
                "rate, or check the data. No weight was changed by it, and the last checkpoint is good."
            )
    loss = sum(losses) / len(losses)
    if config.max_loss_ratio and len(recent) == SPIKE_WINDOW:
        usual = statistics.median(recent)
        if loss > config.max_loss_ratio * usual > 0:
            raise TrainingError(
                f"The loss jumped to {loss:.4g} at step {step}, from a median of {usual:.4g} over the last "
                f"{SPIKE_WINDOW} steps, {_batch(step, config)}: check these samples, lower the learning rate, or raise "
                "train.max_loss_ratio. No weight was changed by it, and the last checkpoint is good."
            )


def _batch(step: int, config: TrainConfig, rank: int | None = None) -> str:
    """Names the samples of a step by their places in the order of the data."""
    places = range(config.batch_size)
    if rank is not None:
        parts = config.parts(rank, distributed.size())
        places = range(parts[0].start, parts[-1].stop)
    first = step * config.batch_size
    return f"samples {first + places.start} to {first + places.stop - 1}"


@contextlib.contextmanager
def readable_failures(when: str, remedy: str = "") -> Iterator[None]:
    """Says of a failure on which worker and when it happened; of a lack of memory, what to change."""
    try:
        yield
    except ArdiffError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise TrainingError(
                f"Worker {distributed.rank()} ran out of memory {when}: {remedy or SMALLER_PARTS}."
            ) from error
        error.add_note(f"worker {distributed.rank()} {when}")
        raise


class _Meter:
    """Measures a worker's training between two logs."""

    def __init__(self, config: TrainConfig, device: torch.device, clock: Callable[[], float]) -> None:
        self.config, self.device, self.clock = config, device, clock
        self.since, self.waited, self.parts, self.flops = clock(), 0.0, 0, 0
        self.known: dict[tuple[int, ...], int] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before
        self.parts += 1

    @contextlib.contextmanager
    def counting(self, *kind: int) -> Iterator[None]:
        """Around the passes, forward and backward, of a part of a batch: the first of each ``kind`` is counted."""
        if kind in self.known:
            yield
        else:
            with FlopCounter() as counter:
                yield
            self.known[kind] = counter.total
        self.flops += self.known[kind]

    def read(self) -> dict[str, float]:
        """Throughput since the last call, and the largest of all workers' :data:`LARGEST`; all of them call it."""
        now = self.clock()
        seconds, parts = max(now - self.since, 1e-9), self.parts
        flops = self.flops / seconds
        values = {
            "samples_per_second": parts
            / len(self.config.parts(0, distributed.size()))
            * self.config.batch_size
            / seconds,
            "data_wait_share": min(self.waited / seconds, 1.0),
            "tflops_per_worker": flops / 1e12,
            "memory_gib": _peak_memory(self.device) / 2**30,
        }
        if self.config.peak_tflops:
            values["mfu"] = flops / 1e12 / self.config.peak_tflops
        self.since, self.waited, self.parts, self.flops = now, 0.0, 0, 0
        # The worker that waits longest holds up all others, and the one with least room decides what fits.
        largest = distributed.max_over([values[name] for name in LARGEST], self.device)
        return values | dict(zip(LARGEST, largest, strict=True))


def _peak_memory(device: torch.device) -> int:
    """Bytes that this worker has had at most: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
