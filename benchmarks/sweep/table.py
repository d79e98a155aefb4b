"""The sweep's result: a CSV row for each name, and a summary in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from tdm_lightning.core import tables
from tdm_lightning.core.tables import append_csv, read_csv
from tdm_lightning.errors import SettingError

Outcome = Literal["reduced", "refused", "failed"]


@dataclass(frozen=True)
class Row:
    """What became of one name.

    Attributes:
        name: as timm has it.
        module: timm's module that registers it.
        kind: class of the model.
        block: class of its blocks.
        attention: class of their attention; empty where the block holds the projections itself.
        depth: number of blocks, as timm has them.
        parameters: of the model as timm has it.
        shrunk: what was cut for the run; empty: nothing.
        image: height × width of the image.
        outcome: ``reduced`` (all checks passed), ``refused`` by ``attach``, or ``failed``.
        patches: patch tokens in front of the first block; 0 where nothing ran.
        remaining: patch tokens behind the last.
        identity_gap, shuffled_gap, stray_gap, reduced_gap: see
            :class:`~benchmarks.sweep.examine.Examined`.
        reason: why it was refused, or what failed.
        settings: what the sweep was made with.
    """

    name: str
    module: str
    kind: str = ""
    block: str = ""
    attention: str = ""
    depth: int = 0
    parameters: int = 0
    shrunk: str = ""
    image: str = ""
    outcome: Outcome = "failed"
    patches: int = 0
    remaining: int = 0
    identity_gap: float = math.nan
    shuffled_gap: float = math.nan
    stray_gap: float = math.nan
    reduced_gap: float = math.nan
    reason: str = ""
    settings: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, none if it does not exist. A last line that was cut off is left out.

    Raises:
        ValueError: if it has other columns.
    """
    found = read_csv(path)
    if found and tuple(found[0]) != COLUMNS:
        raise SettingError(
            f"{path} is no table of this sweep: its columns are {list(found[0])}; choose another"
            " folder"
        )
    return [_row(values) for values in found]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A new CSV file of rows."""
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, row)


def append_row(path: Path, row: Row) -> None:
    """One more line of a CSV file, which is made if need be."""
    append_csv(path, _cells(row))


def _cells(row: Row) -> dict[str, object]:
    """Gaps with two digits, empty where there is none."""
    return {
        key: value if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.2g}"
        for key, value in asdict(row).items()
    }


def _row(values: dict[str, str]) -> Row:
    numbers: dict[str, int | float] = {
        key: int(values[key]) for key in ("depth", "parameters", "patches", "remaining")
    }
    numbers |= {key: float(value or "nan") for key, value in values.items() if key.endswith("_gap")}
    return Row(**{**values, **numbers})  # type: ignore[arg-type]


def markdown(rows: Sequence[Row]) -> str:
    """The summary: names per module, kinds of blocks, and what was refused or failed."""
    modules = list(dict.fromkeys(row.module for row in rows))
    kinds = sorted({(row.kind, row.block, row.attention) for row in rows})
    settings = ", ".join(sorted({row.settings for row in rows}))
    parts = [
        "# timm's Vision Transformers under TDM",
        f"Made by `python -m benchmarks.sweep`; {settings}.",
        (
            "A name counts as *reduced* if, with every parameter given a say by seeded noise, TDM"
            " attaches to it; it equals plain timm at keep rate 1 and with its patches (and their"
            " positions) shuffled in front of every block; and at keep rate 0.7, at three blocks"
            " behind the quarters of its depth, its tokens fall, its output changes, and output and"
            " gradients are finite. Where blocks ask for positions, leaving those behind must"
            " change the output. *Shrunk* names were run with fewer blocks or heads, through the"
            " same entry point. Every name is in the CSV file beside this one."
        ),
        _summary(
            "module",
            [(module, [row for row in rows if row.module == module]) for module in modules],
        ),
        _summary(
            "class, block, attention",
            [
                (
                    ", ".join(filter(None, kind)),
                    [row for row in rows if (row.kind, row.block, row.attention) == kind],
                )
                for kind in kinds
            ],
        ),
    ]
    for outcome in ("refused", "failed"):
        listed = [
            f"- `{row.name}` ({row.module}): {row.reason}" for row in rows if row.outcome == outcome
        ]
        parts.append(f"## {outcome.capitalize()}\n\n" + ("\n".join(listed) or "None."))
    return "\n\n".join(parts) + "\n"


def _summary(title: str, groups: Sequence[tuple[str, Sequence[Row]]]) -> str:
    lines = []
    everything = [row for _, members in groups for row in members]
    for label, rows in [*groups, ("**all**", everything)]:
        reduced = [row for row in rows if row.outcome == "reduced"]
        counts = [len(rows), len(reduced), sum(bool(row.shrunk) for row in reduced)]
        counts += [sum(row.outcome == outcome for row in rows) for outcome in ("refused", "failed")]
        lines.append([label, *map(str, counts)])
    header = [title, "names", "reduced", "of these shrunk", "refused", "failed"]
    return tables.markdown(header, lines)
