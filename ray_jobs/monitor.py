"""The actor behind :func:`ray_jobs.common.remote_progress`. It imports next to nothing: every stage starts one."""

from ardiff.errors import ArdiffError


class Monitor:
    """Collects what the processes of a stage tell of their progress and failures, until the driver asks."""

    def __init__(self) -> None:
        self.completed, self.note = 0, ""
        self.lines: list[str] = []
        self.error: ArdiffError | None = None
        self.accusation = ""

    def set(self, completed: int, note: str = "") -> None:
        self.completed, self.note = completed, note

    def forgive(self) -> None:
        self.accusation = ""

    def accuse(self, reason: str) -> None:
        self.accusation = self.accusation or reason

    def blame(self) -> str:
        return self.accusation

    def add(self, count: int) -> None:
        self.completed += count

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fail(self, error: ArdiffError) -> None:
        self.error = error

    def failure(self) -> ArdiffError | None:
        return self.error

    def read(self) -> tuple[int, str, list[str]]:
        lines, self.lines = self.lines, []
        return self.completed, self.note, lines
