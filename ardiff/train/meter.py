"""Throughput, time spent waiting for data, model FLOPs and memory of training."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator

import torch

from ardiff import distributed
from ardiff.train.config import TrainConfig
from ardiff.train.flops import FlopCounter

MAXIMA = ("data_wait_share", "memory_gib")
"""Values reduced by the maximum over ranks: the slowest rank delays the others, the fullest one limits what fits."""


class Meter:
    """Measures this rank's training between two log entries."""

    def __init__(self, config: TrainConfig, device: torch.device, clock: Callable[[], float]) -> None:
        self.config, self.device, self.clock = config, device, clock
        self.since, self.waited, self.micro_batches, self.flops = clock(), 0.0, 0, 0
        self.flops_by_kind: dict[tuple[int, ...], int] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the time that its block waits for a micro-batch."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before
        self.micro_batches += 1

    @contextlib.contextmanager
    def counting(self, *kind: int) -> Iterator[None]:
        """Counts the FLOPs of its block, a forward and backward pass. Blocks of one ``kind`` cost the same, so only the
        first of them is counted operation by operation."""
        if kind in self.flops_by_kind:
            yield
        else:
            with FlopCounter() as counter:
                yield
            self.flops_by_kind[kind] = counter.total
        self.flops += self.flops_by_kind[kind]

    def read(self) -> dict[str, float]:
        """The values since the last call. Every rank must call it."""
        now = self.clock()
        seconds = max(now - self.since, 1e-9)
        steps = self.micro_batches / len(self.config.micro_batches(0, distributed.size()))
        tflops = self.flops / seconds / 1e12
        values = {
            "samples_per_second": steps * self.config.batch_size / seconds,
            "data_wait_share": min(self.waited / seconds, 1.0),
            "tflops_per_worker": tflops,
            "memory_gib": _peak_memory(self.device) / 2**30,
        }
        if self.config.peak_tflops:
            values["mfu"] = tflops / self.config.peak_tflops
        self.since, self.waited, self.micro_batches, self.flops = now, 0.0, 0, 0
        maxima = distributed.max_over([values[name] for name in MAXIMA], self.device)
        return values | dict(zip(MAXIMA, maxima, strict=True))


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this rank, on the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
