"""Ends an attempt after a checkpoint when a worker will be lost soon: its node is drained, or it received SIGTERM.

Ray reports a drain, with its deadline, to all workers (`ray start --block` drains its own node on SIGTERM). Ray Train's
public call for it, ``ray.train.get_preemption_info``, synchronises the workers through an actor; here each worker reads
its own copy, and the reduction of every training step tells the others (:func:`ardiff.train.loop.train`).
"""

import signal
from types import FrameType
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from ardiff import distributed


class SigtermHandler:
    """Remembers the first SIGTERM, so that training can store a checkpoint. The second one ends the process."""

    def __init__(self) -> None:
        """Replaces Ray's handler. Runs on the main thread."""
        self.received = False
        self.end_process: Any = signal.signal(signal.SIGTERM, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.end_process(number, frame)
        self.received = True


class HandleSigterm(WorkerCallback):
    """Sets the handler of SIGTERM in every worker's process."""

    def after_init_train_context(self) -> None:
        """Called by Ray Train on the worker's main thread, the only one that can set handlers."""
        SigtermHandler()


def is_preempted() -> bool:
    """Whether this worker knows that it, or another worker, will be lost soon."""
    return _has_sigterm() or get_train_context().preemption_context.preemption_info is not None


def end_attempt(step: int, device: torch.device, progress: Any) -> RayActorError:
    """Waits until the checkpoint of ``step`` is registered. Every rank must call it, and raise what it returns.

    Ray Train counts this error as the loss of a preempted worker, which is no failure, and starts the next attempt.
    """
    reason = _reason(device)
    # Ray Train drops the checkpoint if this worker ends before the controller has read its report.
    ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
    ray.get(progress.report_preemption.remote(f"{reason}; the attempt ends after step {step}"))
    return RayActorError(error_msg=f"Preempted: {reason}.", preempted=True)


def _has_sigterm() -> bool:
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, SigtermHandler) and handler.received


def _reason(device: torch.device) -> str:
    """Which workers will be lost and why, as far as any rank knows; the same on every rank."""
    ranks, info = range(distributed.size()), get_train_context().preemption_context.preemption_info
    flags = [float(_has_sigterm() and rank == distributed.rank()) for rank in ranks]
    flags += [float(info is not None and rank in info.preempted_ranks) for rank in ranks]
    totals = distributed.sum_over(flags, device)
    reasons = {"received SIGTERM": totals[: len(ranks)], "on a drained node": totals[len(ranks) :]}
    workers = {reason: [f"worker {rank}" for rank in ranks if counts[rank]] for reason, counts in reasons.items()}
    return "; ".join(f"{', '.join(names)} {reason}" for reason, names in workers.items() if names)
