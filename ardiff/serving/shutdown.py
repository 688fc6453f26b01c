"""The shutdown of a replica."""

import math
import time
from collections.abc import Callable


class Shutdown:
    """Whether the replica shuts down, and until when its jobs may run."""

    def __init__(self, requested: Callable[[], bool], drain_seconds: float) -> None:
        """``requested`` returns whether the host of the replica wants it to stop."""
        self._requested, self._drain_seconds = requested, drain_seconds
        self.deadline = math.inf
        """End of the time for draining, by the monotonic clock."""

    @property
    def started(self) -> bool:
        """Whether the replica shuts down: it takes no more jobs."""
        return self.deadline < math.inf

    @property
    def overdue(self) -> bool:
        """Whether the time for draining is over."""
        return time.monotonic() > self.deadline

    def begin(self) -> None:
        """Starts the shutdown; the time for draining counts from the first call."""
        if not self.started:
            self.deadline = time.monotonic() + self._drain_seconds

    def check(self) -> bool:
        """Starts the shutdown if the host requests it. Returns whether it has started."""
        if self._requested():
            self.begin()
        return self.started
