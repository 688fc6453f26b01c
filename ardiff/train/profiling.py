"""Traces of a few training steps by torch's profiler, to be looked at in Perfetto or chrome://tracing."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

SKIPPED = 10
"""Steps before the first that is traced: the first ones compile, fill caches and open connections."""


class Tracer:
    """Traces some steps of what calls it.

    Args:
        steps: How many; 0 traces nothing and costs nothing.
        keep: Is given the trace, in Chrome's format and gzip, when it is complete.
    """

    def __init__(self, steps: int, keep: Callable[[bytes], None]) -> None:
        self.first, self.last, self.keep = SKIPPED, SKIPPED + steps, keep
        self.done = 0
        self.profiler: profile | None = None

    def step(self) -> None:
        """To be called after every step."""
        self.done += 1
        if self.done == self.first < self.last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()
        if self.done == self.last:
            self.close()

    def close(self) -> None:
        """Ends the trace early, if there is one."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(file))
            self.keep(file.read_bytes())
