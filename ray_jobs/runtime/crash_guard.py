"""Limits retries of inputs that crash the process that reads them, by a fault in FFmpeg or for lack of memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray

MAX_CRASHES = 2
"""Processes that may crash on an input before the input counts as bad."""
TASK_RETRIES = 50
"""Times that Ray Data restarts a task whose process crashed. Ray's own default has no limit."""


@contextlib.contextmanager
def crash_guard(progress: Any, name: str) -> Iterator[int]:
    """Wraps the work on an input that may crash this process; yields how many processes it has crashed before.

    From ``MAX_CRASHES`` on, the caller must skip the input. The count is kept by input, since Ray retries a task as a
    whole: the other inputs of the task do not count as crashed.
    """
    crashes = min(ray.get(progress.begin_input.remote(name)), MAX_CRASHES)
    yield crashes
    if crashes < MAX_CRASHES:
        progress.end_input.remote(name)
