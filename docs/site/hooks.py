"""Hooks of mkdocs: docstrings name objects as Sphinx does and show code as doctest does, unknown to Markdown."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?([\w.]+)</code>")
# Markdown takes `>>>` for three quotations in one another.
DOCTEST = re.compile(r"(?:<blockquote>\s*){3}<p>(.*?)</p>\s*(?:</blockquote>\s*){3}", re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Shows ``:class:`~ardiff.dit.DiT``` as the name only, and lines that begin with ``>>>`` as code."""
    html = ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
    return DOCTEST.sub(lambda match: f"<pre><code>{match[1].replace('<br />', '')}</code></pre>", html)
