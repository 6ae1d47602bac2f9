"""Links out of docs/ lead to sources where the repository is read; the site, which has no sources, shows their names."""

import re
from typing import Any

_SOURCE = re.compile(r"\[`?([^\]`]+)`?\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Of MkDocs, for every page."""
    return _SOURCE.sub(r"`\1`", markdown)
