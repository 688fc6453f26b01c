"""The console: lines for the user, or one JSON object per line for log collectors."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

from ardiff import logs

console = Console(stderr=True, highlight=False, soft_wrap=True)
logger = logging.getLogger(__name__)


def print_line(message: str, **fields: Any) -> None:
    """Prints a line to standard error, or logs it as JSON together with ``fields``."""
    if logs.is_json():
        logger.info("%s", Text.from_markup(message).plain, extra={"fields": fields})
    else:
        console.print(message)
