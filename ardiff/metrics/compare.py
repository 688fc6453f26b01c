"""Scores of several evaluations in one table, provided that they are of one protocol.

ardiff compare runs/a/scores runs/b/scores
"""

from dataclasses import dataclass

from ardiff.data import storage
from ardiff.errors import ArdiffError, ConfigError
from ardiff.metrics.protocol import same_protocol_or_raise
from ardiff.metrics.scores import SetScore, read_scores, table

REMAINING = "runs"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Which evaluations to put side by side."""

    runs: tuple[str, ...] = ()
    """Folders that ``ardiff evaluate`` wrote, or their ``scores.json``, local or ``s3://``."""
    output: str | None = None
    """Also write the table to this text file."""


def run(config: CompareConfig) -> None:
    """Prints the table. Raises ArdiffError if two scores of a metric are of different protocols; names the field."""
    if not config.runs:
        raise ConfigError("Give at least one evaluation: ardiff compare FOLDER FOLDER ...")
    text = table(comparable(config.runs))
    print(text)
    if config.output is not None:
        storage.write_bytes(config.output, f"{text}\n".encode())


def comparable(runs: tuple[str, ...]) -> list[tuple[str, SetScore]]:
    """All scores with names that tell them apart. Raises ArdiffError if those of a metric differ in their protocol."""
    rows = [(place, score) for place in runs for score in read_scores(place)]
    first: dict[str, tuple[str, SetScore]] = {}
    for place, score in rows:
        known_place, known = first.setdefault(score.metric, (place, score))
        try:
            same_protocol_or_raise(known.protocol, score.protocol)
        except ArdiffError as error:
            raise ArdiffError(f"{score.metric} of {known_place} and {place}: {error}") from error
    return [(score.set if len(runs) == 1 else f"{place}: {score.set}", score) for place, score in rows]
