"""Checks that stop training before a bad update, and errors that say where training failed."""

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Iterator

import torch

from ardiff import distributed
from ardiff.errors import ArdiffError, TrainingError
from ardiff.train.config import TrainConfig

SPIKE_WINDOW = 100
"""Number of steps whose median loss a spike is compared with."""
MAX_OVERFLOWS = 50
"""Consecutive steps whose gradients may overflow fp16 before training stops."""
SHARD_MORE = "shard more state with train.engine=deepspeed and a higher train.deepspeed.stage"
USE_LESS_MEMORY = f"raise train.gradient_accumulation, set train.activation_checkpointing=true, or {SHARD_MORE}"
UNCHANGED = "The weights were not updated with it, and the last checkpoint is good."


class StepChecks:
    """Raises TrainingError for losses and gradients that are not finite, and for spikes of the loss."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.recent_losses = deque[float](maxlen=SPIKE_WINDOW)
        self.overflows = 0
        """Consecutive steps with overflowing gradients."""

    def forget_losses(self) -> None:
        """Starts the window of the spike check again, for example because a new stage changes the loss."""
        self.recent_losses.clear()

    def check_losses(self, step: int, rank_losses: list[float], discriminator_loss: float) -> None:
        """Checks the losses of step ``step`` (0-based) before its update. The batch's loss is the mean over ranks."""
        for rank, loss in enumerate(rank_losses):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"The loss is {loss} at step {step} on worker {rank}, {self._samples(step, rank)}: lower the "
                    f"learning rate, or check the data. {UNCHANGED}"
                )
        loss = sum(rank_losses) / len(rank_losses)
        if self.config.max_loss_ratio and len(self.recent_losses) == SPIKE_WINDOW:
            median = statistics.median(self.recent_losses)
            if loss > self.config.max_loss_ratio * median > 0:
                raise TrainingError(
                    f"The loss jumped to {loss:.4g} at step {step}, from a median of {median:.4g} over the last "
                    f"{SPIKE_WINDOW} steps, {self._samples(step)}: check these samples, lower the learning rate, or "
                    f"raise train.max_loss_ratio. {UNCHANGED}"
                )
        if not math.isfinite(discriminator_loss):
            raise TrainingError(
                f"The discriminator's loss is {discriminator_loss} at step {step}, {self._samples(step)}: lower the "
                f"learning rate, or check the data. {UNCHANGED}"
            )
        self.recent_losses.append(loss)

    def check_gradients(self, step: int, norm: float, discriminator_norm: float) -> None:
        """Checks the gradient norms of step ``step`` (0-based). With fp16, some consecutive steps may overflow."""
        self.overflows = self.overflows + 1 if not math.isfinite(norm + discriminator_norm) else 0
        if self.config.precision == "fp16" and self.overflows <= MAX_OVERFLOWS:
            return
        for name, value in (("gradient", norm), ("discriminator's gradient", discriminator_norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"The {name} is not finite at step {step}, {self._samples(step)}: lower the learning rate, or "
                    f"check the data. {UNCHANGED}"
                )

    def _samples(self, step: int, rank: int | None = None) -> str:
        """The samples of a step, of all ranks or one, by their positions in the order of the data."""
        first, last = 0, self.config.batch_size - 1
        if rank is not None:
            micro_batches = self.config.micro_batches(rank, distributed.size())
            first, last = micro_batches[0].start, micro_batches[-1].stop - 1
        position = step * self.config.batch_size
        return f"samples {position + first} to {position + last}"


@contextlib.contextmanager
def explain_failures(when: str, remedy: str = USE_LESS_MEMORY) -> Iterator[None]:
    """Adds worker and time to an exception. Running out of memory becomes a TrainingError with a ``remedy``."""
    try:
        yield
    except ArdiffError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise TrainingError(f"Worker {distributed.rank()} ran out of memory {when}: {remedy}.") from error
        error.add_note(f"worker {distributed.rank()} {when}")
        raise
