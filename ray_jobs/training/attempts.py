"""The progress actor of a training run, which also records failed attempts and stops hopeless retries."""

from ardiff.errors import TrainingError
from ray_jobs.runtime.progress_actor import ProgressActor

MAX_IDENTICAL_FAILURES = 3
"""Attempts that may fail with the same error in a row; then training stops."""


class TrainingProgress(ProgressActor):
    """Progress of a training run over all its attempts. Ray Train starts a new attempt after a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.attempt_failure = self.attempt_error = ""  # of the running attempt: with and without the worker's name
        self.last_attempt_failure, self.last_attempt_error, self.identical = "", "", 0

    def begin_attempt(self) -> None:
        """Training begins again. Inputs that the previous attempt left unfinished did not crash a process."""
        self.attempt_failure = ""
        self.unfinished.clear()

    def report_failure(self, worker: str, error: str) -> None:
        """A worker of the running attempt has failed. Only the first report of an attempt is kept."""
        if not self.attempt_failure:
            self.attempt_failure, self.attempt_error = f"{worker} {error}", error

    def end_attempt(self, lost: str) -> None:
        """An attempt has failed, for the reason ``lost`` if no worker reported one.

        Fails the run if the last ``MAX_IDENTICAL_FAILURES`` attempts failed with the same error.
        """
        reported = bool(self.attempt_failure)
        self.last_attempt_failure, error = (self.attempt_failure, self.attempt_error) if reported else ("", "")
        self.identical = self.identical + 1 if error and error == self.last_attempt_error else 1
        self.last_attempt_error, self.attempt_failure = error, ""
        self.log(f"An attempt failed: {self.last_attempt_failure or lost}")
        if self.identical == MAX_IDENTICAL_FAILURES and self.error is None:
            self.error = TrainingError(
                f"Training failed {MAX_IDENTICAL_FAILURES} times in the same way, so another attempt is of no use: "
                f"{self.last_attempt_failure}. The last checkpoint is good; with --debug the same command shows the "
                "workers' output."
            )

    def last_failure(self) -> str:
        """The worker and the error of the last failed attempt; empty if no worker reported one."""
        return self.attempt_failure or self.last_attempt_failure
