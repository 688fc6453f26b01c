"""Callbacks of the training loop: progress bars, loggers and checkpoint storage hook in here."""

import itertools
from collections.abc import Iterable

from torch import Tensor

from ardiff.train.checkpoint import TrainState


class TrainingCallback:
    """Does nothing; override the hooks of interest. ``step`` counts completed updates."""

    def flags(self) -> list[float]:
        """Numbers of this rank that the next step sums over all ranks; equally many on every rank and at every
        step."""
        return []

    def on_flags(self, totals: list[float]) -> None:
        """In every step, with the sums of :meth:`flags`. So all ranks can act on them at the same step."""

    def on_step_end(self, step: int, loss: float) -> None:
        """After every update, with the loss of the whole batch."""

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """Every ``log_every`` steps and after the last one. Values are reduced over all ranks."""

    def on_samples(self, step: int, videos: Tensor) -> None:
        """Every ``sample_every`` steps and after the last one, on rank 0: uint8 ``(B, F, H, W, 3)``."""

    def on_checkpoint(self, state: TrainState) -> None:
        """Every ``checkpoint_every`` steps, after the last one and on preemption, on every rank. The engine holds the
        tensors."""

    def on_end(self) -> None:
        """On every rank when training ends: after the last step, on preemption, or before an error of the checks."""

    def on_trace(self, content: bytes) -> None:
        """When ``profile`` steps are traced, on every rank: the trace, see :mod:`ardiff.train.profiling`."""


class CallbackList(TrainingCallback):
    """Calls several callbacks in their order."""

    def __init__(self, callbacks: Iterable[TrainingCallback]) -> None:
        self.callbacks = tuple(callbacks)

    def flags(self) -> list[float]:
        return [flag for callback in self.callbacks for flag in callback.flags()]

    def on_flags(self, totals: list[float]) -> None:
        remaining = iter(totals)
        for callback in self.callbacks:
            callback.on_flags(list(itertools.islice(remaining, len(callback.flags()))))

    def on_step_end(self, step: int, loss: float) -> None:
        for callback in self.callbacks:
            callback.on_step_end(step, loss)

    def on_log(self, step: int, values: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_log(step, values)

    def on_samples(self, step: int, videos: Tensor) -> None:
        for callback in self.callbacks:
            callback.on_samples(step, videos)

    def on_checkpoint(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(state)

    def on_end(self) -> None:
        for callback in self.callbacks:
            callback.on_end()

    def on_trace(self, content: bytes) -> None:
        for callback in self.callbacks:
            callback.on_trace(content)
