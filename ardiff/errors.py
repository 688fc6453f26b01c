"""Errors that a user can act on: the message says what is wrong and what to do about it, in one or two sentences."""


class ArdiffError(Exception):
    """Base of every error that the command line prints as a sentence, without a traceback."""


class ConfigError(ArdiffError, ValueError):
    """A configuration value is missing, unknown, of the wrong type or contradicts another."""


class DataError(ArdiffError):
    """The input data cannot be used as it is."""


class StorageError(DataError):
    """A place cannot be listed, read or written."""

    attempts: int = 1
    """How often it was tried."""
    transient: bool = False
    """The reason is one that passes, but did not in the time allowed: throttling, resets, a server that is away."""


class DecodeError(DataError):
    """A video file cannot be decoded."""

    kind: str = "undecodable"
    """The sort of damage, for counting: ``empty``, ``truncated``, ``corrupt``, ``no video stream`` and so on."""


class ClipTooShortError(DecodeError):
    """A video has fewer frames than the clip that was asked of it."""

    kind = "too short"


class CheckpointError(ArdiffError):
    """A checkpoint is missing, incomplete, or was made by a model of other sizes."""


class TrainingError(ArdiffError):
    """Training cannot go on, for example because the loss is not finite."""
