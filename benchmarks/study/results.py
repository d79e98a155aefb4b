"""Finished cells as two tables: numbers to read, and which images were right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.plan import Method
from benchmarks.study.store import Record, load_cells, unpack_bits
from tdm_lightning.compare.methods import describe
from tdm_lightning.core.tables import read_csv, write_csv
from tdm_lightning.strategies import Strategy

#: Before and after the fine-tuning.
WHEN = ("before", "after")


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        method: its name in the figures.
        rate: TDM's keep rate whose budget it has.
        seed: of the fine-tuning.
        setting: the strategy's arguments; empty where it has none for this budget.
        gmacs: 10⁹ multiply-accumulates per image, all of them.
        gmacs_backbone: without the strategy's parameter-free work.
        accuracy: in [0, 1], ``"before"`` and ``"after"`` fine-tuning.
        diversity: score of the patch tokens after each block, likewise.
        tokens: patch tokens after each block.
        correct: which images were right, likewise, N bool.
        facts: whatever else is known, as text.
    """

    method: str
    rate: float
    seed: int
    setting: str = ""
    gmacs: float = float("nan")
    gmacs_backbone: float = float("nan")
    accuracy: dict[str, float] = field(default_factory=dict)
    diversity: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    correct: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def collect(folder: Path, part: str, methods: Sequence[Method]) -> list[Path]:
    """Write ``PART.csv`` and ``PART_correct.csv`` of the finished cells in ``FOLDER/PART``; none
    where there are no cells.

    Args:
        folder: what the study wrote to.
        part: ``"grid"`` or ``"ablation"``.
        methods: the order of the rows.
    """
    order = {method.name: place for place, method in enumerate(methods)}
    cells = sorted(
        load_cells(folder / part),
        key=lambda cell: (order[cell["method"]], -cell["rate"], cell["seed"]),
    )
    if not cells:
        return []
    numbers, correct = folder / f"{part}.csv", folder / f"{part}_correct.csv"
    write_csv(numbers, [_numbers(cell) for cell in cells])
    write_csv(correct, [_correct(cell) for cell in cells])
    return [numbers, correct]


def read(folder: Path, part: str) -> list[Result]:
    """The results in the tables of a part; none where there are no tables."""
    numbers, correct = folder / f"{part}.csv", folder / f"{part}_correct.csv"
    if not numbers.exists():
        return []
    right = {(row["method"], row["rate"], row["seed"]): row for row in read_csv(correct)}
    return [
        _result(row, right[row["method"], row["rate"], row["seed"]]) for row in read_csv(numbers)
    ]


def _numbers(cell: Record) -> dict[str, Any]:
    setting = "" if cell["setting"] is None else describe(Strategy.from_config(cell["setting"]))[1]
    own = {name: cell[name] for name in ("method", "rate", "seed")} | {"setting": setting}
    costs = {name: cell.get(name, "") for name in ("gmacs", "gmacs_backbone", "gmacs_budget")}
    scores = {f"accuracy_{when}": cell.get(f"accuracy_{when}", "") for when in WHEN}
    lists = {
        name: " ".join(map(str, cell.get(name, ())))
        for name in ("tokens", *(f"diversity_{when}" for when in WHEN))
    }
    seconds = {
        name: cell.get(name, "")
        for name in ("seconds_to_solve", "seconds_to_evaluate", "seconds_to_finetune")
    }
    texts = {name: cell.get(name, "") for name in ("note", "reason", "images")}
    return {
        **own,
        **costs,
        **scores,
        **lists,
        **seconds,
        **texts,
        **cell["settings"],
        **cell["environment"],
    }


def _correct(cell: Record) -> dict[str, Any]:
    bits = {when: cell.get(f"correct_{when}", "") for when in WHEN}
    return {**{name: cell[name] for name in ("method", "rate", "seed", "images")}, **bits}


def _result(row: dict[str, str], right: dict[str, str]) -> Result:
    row = dict(row)
    count = int(right["images"])
    return Result(
        row.pop("method"),
        float(row.pop("rate")),
        int(row.pop("seed")),
        row.pop("setting"),
        float(row.pop("gmacs") or "nan"),
        float(row.pop("gmacs_backbone") or "nan"),
        {when: float(value) for when in WHEN if (value := row.pop(f"accuracy_{when}"))},
        {
            when: list(map(float, value.split()))
            for when in WHEN
            if (value := row.pop(f"diversity_{when}"))
        },
        list(map(int, row.pop("tokens").split())),
        {when: unpack_bits(right[when], count) for when in WHEN if right[when]},
        row,
    )
