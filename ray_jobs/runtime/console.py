"""The console: one line to the user, or one JSON object per line for log collectors."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

from ardiff import logs

console = Console(stderr=True, highlight=False, soft_wrap=True)
logger = logging.getLogger(__name__)


def print_line(message: str, **fields: Any) -> None:
    """One line to the user, on standard error; where lines are JSON, with ``fields`` for programs."""
    if logs.is_json():
        logger.info("%s", Text.from_markup(message).plain, extra={"fields": fields})
    else:
        console.print(message)
