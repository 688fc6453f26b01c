"""Errors that a user can act on: the message says what is wrong and what to do about it, in one or two sentences."""


class ArdiffError(Exception):
    """Base of every error that the command line prints as a sentence, without a traceback."""


class ConfigError(ArdiffError, ValueError):
    """A configuration value is missing, unknown, of the wrong type or contradicts another."""


class DataError(ArdiffError):
    """The input data cannot be used as it is."""


class DecodeError(DataError):
    """A video file cannot be decoded."""


class ClipTooShortError(DataError):
    """A video has fewer frames than the clip that was asked of it."""


class CheckpointError(ArdiffError):
    """A checkpoint is missing, incomplete, or was made by a model of other sizes."""


class TrainingError(ArdiffError):
    """Training cannot go on, for example because the loss is not finite."""
