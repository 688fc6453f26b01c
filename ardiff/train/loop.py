"""The training loop. A :class:`Task` defines the loss, an :class:`Engine` updates the weights, callbacks log and store.

The caller provides the data, as an iterator of micro-batches.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ardiff import distributed
from ardiff.errors import TrainingError
from ardiff.randomness import BatchGenerator
from ardiff.tensors import to_device
from ardiff.train.callbacks import CallbackList, TrainingCallback
from ardiff.train.checkpoint import TrainState
from ardiff.train.checks import SHARD_MORE, StepChecks, explain_failures
from ardiff.train.config import TrainConfig
from ardiff.train.engines.base import Engine, ema_model
from ardiff.train.meter import Meter
from ardiff.train.optim import learning_rate_factor
from ardiff.train.profiling import Tracer
from ardiff.train.tasks.base import Batch, Task


def train(
    task: Task,
    engine: Engine,
    batches: Iterator[Batch],
    config: TrainConfig,
    start: TrainState,
    callbacks: Sequence[TrainingCallback] = (),
    clock: Callable[[], float] = time.monotonic,
    discriminator: Engine | None = None,
    preempted: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains from ``start`` to ``config.num_steps``, or until a rank is preempted. Every rank makes the same call.

    Args:
        batches: This rank's micro-batches from position ``start.samples`` of the data, on any device.
        start: Where training is; step 0 for a new run.
        discriminator: The engine of ``task.discriminator``, if the task has one.
        preempted: Whether this rank has been told that it will end soon. If it is True on any rank, all ranks call
            ``on_checkpoint`` at the end of the same step and return.

    Returns:
        The final state. Its step is below ``config.num_steps`` if a rank was preempted.

    Raises:
        TrainingError: A loss or gradient is not finite, or the loss is a spike; the weights are not updated with it. Or
            memory ran out, or the data ended.
    """
    task.model.train()
    if task.discriminator is not None:
        task.discriminator.train()
    callback, checks = CallbackList(callbacks), StepChecks(config)
    meter, tracer = Meter(config, engine.device, clock), Tracer(config.profile, callback.on_trace)
    for step in range(start.step, config.num_steps):
        adversary = discriminator if step >= task.discriminator_from_step else None
        with explain_failures(f"at step {step}"):
            losses, logged, [notices, *flags] = _accumulate_gradients(
                task, engine, adversary, batches, config, step, meter, lambda: [float(preempted()), *callback.flags()]
            )
        if step in task.stage_starts or adversary is not None:
            checks.forget_losses()
        with _end_on_error(callback):
            checks.check_losses(step, losses, logged.get("discriminator_loss", 0.0))
        lr_factor = learning_rate_factor(config.optimizer, step, config.num_steps)
        with explain_failures(f"at step {step}"):
            norm = engine.step(step, lr_factor)
            if adversary is not None:
                logged["discriminator_grad_norm"] = adversary.step(step, lr_factor)
            callback.on_flags(flags)
        with _end_on_error(callback):
            checks.check_gradients(step, norm, logged.get("discriminator_grad_norm", 0.0))
        tracer.step()
        loss, done = sum(losses) / distributed.size(), step + 1
        callback.on_step_end(done, loss)
        if _due(done, config.log_every, config):
            rates = {"lr_factor": lr_factor, **engine.learning_rates()}
            if adversary is not None:
                rates |= {f"discriminator_{name}": rate for name, rate in adversary.learning_rates().items()}
            callback.on_log(done, {"loss": loss, "grad_norm": norm, **rates, **meter.read(), **logged})
        if config.sample_every and _due(done, config.sample_every, config):
            with explain_failures(f"while making the samples of step {done}", "set train.sample_every=0"):
                model = ema_model(engine)
                if model is not None and (videos := task.samples(model)) is not None:
                    callback.on_samples(done, videos)
        stops = notices > 0 and done % task.checkpoint_interval == 0
        if stops or _due(done, config.checkpoint_every, config):
            with explain_failures(f"while storing the checkpoint of step {done}", SHARD_MORE):
                callback.on_checkpoint(_state(done, config, start))
        if stops:
            break
    else:
        done = max(start.step, config.num_steps)
    with explain_failures("while storing the last checkpoint", SHARD_MORE):
        callback.on_end()
    tracer.close()
    return _state(done, config, start)


@contextlib.contextmanager
def _end_on_error(callback: TrainingCallback) -> Iterator[None]:
    """Ends the callbacks before an error that every rank raises."""
    try:
        yield
    except TrainingError:
        callback.on_end()
        raise


def _due(step: int, interval: int, config: TrainConfig) -> bool:
    return step % interval == 0 or step == config.num_steps


def _state(step: int, config: TrainConfig, start: TrainState) -> TrainState:
    return TrainState(step, step * config.batch_size, start.fingerprint, config.hyperparameters)


def _accumulate_gradients(
    task: Task,
    engine: Engine,
    discriminator: Engine | None,
    batches: Iterator[Batch],
    config: TrainConfig,
    step: int,
    meter: Meter,
    flags: Callable[[], list[float]],
) -> tuple[list[float], dict[str, float], list[float]]:
    """Adds up the gradients of one batch over its micro-batches.

    Returns the loss of each rank, weighted so that their mean is the loss of the batch; the logged values, averaged
    over the batch; and the sums of the ranks' ``flags``. All of them are reduced and read from the device together.
    """
    size, sums = distributed.size(), dict[str, Tensor]()
    rank_losses = torch.zeros(size, dtype=torch.float64, device=engine.device)
    for indices in config.micro_batches(distributed.rank(), size):
        with meter.waiting():
            batch = next(batches, None)
        if batch is None:
            raise TrainingError(f"The data ended at step {step} of {config.num_steps}.")
        draws = BatchGenerator("training", config.seed, step, first=indices.start)
        # Engines average gradients over ranks, which may hold unequal numbers of samples: every sample weighs the same.
        divisor = config.batch_size / (len(indices) * size)
        on_device = {name: to_device(tensor, engine.device) for name, tensor in batch.items()}
        sizes = itertools.chain.from_iterable(tensor.shape for tensor in batch.values())
        with meter.counting(task.kind_of(step), *sizes):
            loss, logged = engine.compute(functools.partial(task.loss, on_device, step, draws))
            engine.backward(loss / divisor)
            if discriminator is not None:
                discriminator_loss, values = discriminator.compute(task.discriminator_loss)
                discriminator.backward(discriminator_loss / divisor)
                logged = {**logged, **values, "discriminator_loss": discriminator_loss}
        rank_losses[distributed.rank()] += loss.detach().double() / divisor
        for name, tensor in logged.items():
            value = tensor.detach().double()
            if value.ndim == 0:  # a mean over the micro-batch: turn it into a sum and a count
                value = torch.stack([value * len(indices), torch.full_like(value, len(indices))])
            sums[name] = sums[name] + value if name in sums else value
    rank_flags = [torch.full((1,), flag, dtype=torch.float64, device=engine.device) for flag in flags()]
    totals = distributed.sum_over(torch.cat([rank_losses, *rank_flags, *sums.values()]), engine.device)
    end = size + len(rank_flags)
    pairs = zip(sums, totals[end::2], totals[end + 1 :: 2], strict=True)
    return totals[:size], {name: total / count for name, total, count in pairs if count}, totals[size:end]
