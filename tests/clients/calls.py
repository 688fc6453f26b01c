"""What the scripts of this folder share."""

from collections.abc import Callable
from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=Exception)


def rejected(kind: type[ErrorT], call: Callable[[], object]) -> ErrorT:
    """The error that the call raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")
