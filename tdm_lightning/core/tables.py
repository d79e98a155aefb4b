"""Tables of figures: as Markdown, as CSV, and for a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table without a line break at its end.

    Args:
        header: titles of the columns.
        rows: cells.
        left: the first so many columns hold words and are flush left, the others flush right.

    >>> print(markdown(["method", "top-1"], [["TDM", "96.1"]]))
    | method | top-1 |
    | --- | ---: |
    | TDM | 96.1 |
    """
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def terminal(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """The same for a terminal."""
    table = Table()
    for column, title in enumerate(header):
        table.add_column(title, justify="left" if column < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """At least one row by the titles of its columns; NaN is left empty."""
    file = io.StringIO()
    _write(file, list(rows[0]), rows, titles=True)
    return file.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write :func:`csv_text`."""
    path.write_text(csv_text(rows), encoding="utf-8", newline="")


def append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file, which is made with its titles if need be."""
    with path.open("a", encoding="utf-8", newline="") as file:
        _write(file, list(row), [row], titles=file.tell() == 0)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, all cells as text; a last line that was cut off is left out, and without
    a file there are none.
    """
    if not path.exists():
        return []
    csv.field_size_limit(2**24)  # a cell may hold the answers to all images
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _write(
    file: Any, header: Sequence[str], rows: Iterable[Mapping[str, Any]], titles: bool
) -> None:
    writer = csv.DictWriter(file, header, lineterminator="\n")
    if titles:
        writer.writeheader()
    for row in rows:
        writer.writerow({title: _shown(value) for title, value in row.items()})


def _shown(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
