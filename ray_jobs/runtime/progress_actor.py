"""The actor behind :func:`ray_jobs.runtime.progress.remote_progress`.

Every stage starts one, so this module imports little.
"""

from ardiff.errors import ArdiffError


class ProgressActor:
    """Collects progress, log lines and failures from the processes of a stage; the driver polls it."""

    def __init__(self) -> None:
        self.completed, self.note = 0, ""
        self.lines: list[str] = []
        self.error: ArdiffError | None = None
        self.unfinished: dict[str, int] = {}

    def set(self, completed: int, note: str = "") -> None:
        """Sets the absolute count, and a short note such as the current loss."""
        self.completed, self.note = completed, note

    def add(self, count: int) -> None:
        """Adds to the count."""
        self.completed += count

    def log(self, line: str) -> None:
        """Prints a line on the driver's console at its next poll."""
        self.lines.append(line)

    def fail(self, error: ArdiffError) -> None:
        """Records an error that the driver raises at the end of the stage."""
        self.error = error

    def failure(self) -> ArdiffError | None:
        """The recorded error."""
        return self.error

    def begin_input(self, name: str) -> int:
        """A process begins an input. Returns how many processes began it before and crashed."""
        self.unfinished[name] = self.unfinished.get(name, 0) + 1
        return self.unfinished[name] - 1

    def end_input(self, name: str) -> None:
        """The process has survived the input."""
        self.unfinished.pop(name, None)

    def read(self) -> tuple[int, str, list[str]]:
        """Count, note, and the lines logged since the last call."""
        lines, self.lines = self.lines, []
        return self.completed, self.note, lines
