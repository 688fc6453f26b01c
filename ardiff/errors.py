"""Errors that a user can act on. A message says what is wrong and what to do, in one or two sentences."""


class ArdiffError(Exception):
    """Base class of errors that the command line prints without a traceback."""


class ConfigError(ArdiffError, ValueError):
    """A configuration value is missing, unknown, of the wrong type or contradicts another."""


class DataError(ArdiffError):
    """The input data cannot be used."""


class StorageError(DataError):
    """A path or URI cannot be listed, read or written."""

    attempts: int = 1
    """Number of attempts."""
    transient: bool = False
    """Whether the cause may pass, such as throttling or a server that is down, but lasted longer than the retries."""


class DecodeError(DataError):
    """A video file cannot be decoded."""

    kind: str = "undecodable"
    """The kind of damage, such as ``empty``, ``truncated``, ``corrupt`` or ``no video stream``."""

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.kind


class ClipTooShortError(DecodeError):
    """A video has fewer frames than a clip needs."""

    kind = "too short"


class CheckpointError(ArdiffError):
    """A checkpoint is missing, incomplete, or belongs to a model of another size."""


class TrainingError(ArdiffError):
    """Training cannot continue, for example because the loss is not finite."""
