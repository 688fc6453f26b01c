"""The progress actor of a training run. It also records failed attempts and stops retries that cannot help."""

from ardiff.errors import TrainingError
from ray_jobs.runtime.progress_actor import ProgressActor

MAX_IDENTICAL_FAILURES = 3
"""Consecutive attempts that may fail with the same error before training stops."""


class TrainingProgress(ProgressActor):
    """Progress of a training run over all attempts. Ray Train starts a new attempt after a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.failed_worker = self.error_message = ""
        """First failure of the running attempt; empty if there is none."""
        self.last_failed_worker = self.last_error_message = ""
        """First failure of the last failed attempt; empty if no worker reported one."""
        self.identical_failures = 0
        self.is_preempted = False
        """Whether the running attempt ends because of a preemption, after a checkpoint."""

    def begin_attempt(self) -> None:
        """Starts a new attempt. Inputs that the previous attempt left unfinished did not crash their process."""
        self.failed_worker = self.error_message = ""
        self.is_preempted = False
        self.unfinished.clear()

    def report_failure(self, worker: str, error: str) -> None:
        """Records that a worker of the running attempt failed. Only the first report of an attempt counts."""
        if not self.failed_worker:
            self.failed_worker, self.error_message = worker, error

    def report_preemption(self, reason: str) -> None:
        """Records that the running attempt ends after a checkpoint. Only the first report of an attempt is logged."""
        if not self.is_preempted:
            self.log(f"Preemption: {reason}")
        self.is_preempted = True

    def end_attempt(self, default: str) -> None:
        """Ends a failed attempt. ``default`` is the reason if no worker reported one. Preemptions are no failures.

        Fails the run if the last ``MAX_IDENTICAL_FAILURES`` attempts failed with the same error, on any worker.
        """
        if self.is_preempted:
            return
        repeated = bool(self.error_message) and self.error_message == self.last_error_message
        self.identical_failures = self.identical_failures + 1 if repeated else 1
        self.last_failed_worker, self.last_error_message = self.failed_worker, self.error_message
        self.failed_worker = self.error_message = ""
        self.log(f"An attempt failed: {self.last_failure() or default}")
        if self.identical_failures == MAX_IDENTICAL_FAILURES and self.error is None:
            self.error = TrainingError(
                f"Training failed {MAX_IDENTICAL_FAILURES} times in the same way, so it is not tried again: "
                f"{self.last_failure()}. The last checkpoint is good. Add --debug to the same command to see the "
                "workers' output."
            )

    def last_failure(self) -> str:
        """Worker and error of the running attempt, or of the last failed one; empty if no worker reported one."""
        if self.failed_worker:
            return f"{self.failed_worker} {self.error_message}"
        return f"{self.last_failed_worker} {self.last_error_message}".strip()
