"""Puts the scores of several evaluations into one table. They must have the same protocol.

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
    """Which evaluations to compare."""

    runs: tuple[str, ...] = ()
    """Folders of ``ardiff evaluate``, or their ``scores.json``, local or ``s3://``."""
    output: str | None = None
    """Text file for the table; it is printed in any case."""


def run(config: CompareConfig) -> None:
    """Prints the table. Raises ArdiffError with the field in which the protocols of two scores of a metric differ."""
    if not config.runs:
        raise ConfigError("Give at least one evaluation: ardiff compare FOLDER FOLDER ...")
    text = table(comparable(config.runs))
    print(text)
    if config.output is not None:
        storage.write_bytes(config.output, f"{text}\n".encode())


def comparable(runs: tuple[str, ...]) -> list[tuple[str, SetScore]]:
    """All scores with unique names. Raises ArdiffError if two scores of a metric differ in their protocol."""
    rows = [(uri, score) for uri in runs for score in read_scores(uri)]
    first: dict[str, tuple[str, SetScore]] = {}
    for uri, score in rows:
        first_uri, first_score = first.setdefault(score.metric, (uri, score))
        try:
            same_protocol_or_raise(first_score.protocol, score.protocol)
        except ArdiffError as error:
            raise ArdiffError(f"{score.metric} of {first_uri} and {uri}: {error}") from error
    return [(score.set if len(runs) == 1 else f"{uri}: {score.set}", score) for uri, score in rows]
