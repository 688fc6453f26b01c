"""Hooks of mkdocs: docstrings name other objects as Sphinx does, which Markdown would show with the role."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Shows ``:class:`~ardiff.dit.DiT``` as the name only."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
