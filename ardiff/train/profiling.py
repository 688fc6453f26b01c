"""Traces a few training steps with torch's profiler. View the traces in Perfetto or chrome://tracing."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

SKIPPED_STEPS = 10
"""Steps before the first traced one: the first steps compile, fill caches and open connections."""


class Tracer:
    """Traces some steps of a training loop.

    Args:
        steps: Number of steps to trace; 0 traces nothing and costs nothing.
        on_trace: Called with the complete trace, in Chrome's format, gzipped.
    """

    def __init__(self, steps: int, on_trace: Callable[[bytes], None]) -> None:
        self.first, self.last, self.on_trace = SKIPPED_STEPS, SKIPPED_STEPS + steps, on_trace
        self.done = 0
        self.profiler: profile | None = None

    def step(self) -> None:
        """Must be called after every step."""
        self.done += 1
        if self.done == self.first < self.last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()
        if self.done == self.last:
            self.close()

    def close(self) -> None:
        """Ends a running trace early."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(file))
            self.on_trace(file.read_bytes())
