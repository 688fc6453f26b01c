"""Files of prompts, one per line."""

from ardiff.data import storage
from ardiff.errors import ConfigError

MAX_BYTES = 2**24
"""Largest file of prompts."""


def read_prompts(uri: str) -> list[str]:
    """The lines of a file, local or ``s3://``, without empty ones.

    Raises:
        ConfigError: There is no such file, it is too large, not UTF-8, or holds no prompt.
    """
    if not storage.exists(uri):
        raise ConfigError(f"There is no file of prompts {uri}.")
    if (size := storage.size(uri)) > MAX_BYTES:
        raise ConfigError(f"{uri} has {size} bytes, the limit for prompts is {MAX_BYTES}: split it.")
    try:
        lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri} is not UTF-8 text ({error.reason} at byte {error.start}): convert it.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{uri} holds no prompt: write one on each line.")
    return prompts
