"""How a long command shows that it goes on, and where its results lie."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress


def bars() -> Progress:
    """Bars with the time that remains, on the terminal; none where the output goes to a file."""
    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())


def say_where(paths: Iterable[str | Path]) -> None:
    """Print where the results lie, a path a line, so that other programs can read them."""
    for path in paths:
        print(path)
