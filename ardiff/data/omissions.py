"""What a listing leaves out, counted by reason."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Omissions:
    """Counts what is left out, and keeps an example for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Counts something that is left out."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def update(self, other: "Omissions") -> None:
        """Adds the counts of another listing."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    @property
    def notes(self) -> list[str]:
        """What was left out, a line each."""
        return [f"{count} {why}, such as {self.examples[why]}" for why, count in self.counts.most_common()]
