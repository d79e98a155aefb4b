"""Redraw everything from the saved tables."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study import figures, tables, ward
from benchmarks.study.ablate import DEFAULT, VARIANTS
from benchmarks.study.placement import PLACEMENTS
from benchmarks.study.plan import METHODS
from benchmarks.study.results import WHEN, Result, collect, read
from benchmarks.study.times import read_times
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.plots import save

#: The keep rate of the figure with the diversity scores.
_DIVERSITY_RATE = 0.5


def report(folder: Path) -> list[Path]:
    """Collect the finished cells, and draw every figure and table that there are results for.

    Args:
        folder: what the study wrote to.

    Returns:
        The files written.

    Raises:
        ValueError: if there are no results.
    """
    written = [*collect(folder, "grid", METHODS), *collect(folder, "ablation", VARIANTS)]
    written += collect(folder, "placement", PLACEMENTS)
    written += collect(folder, "ward", ward.VARIANTS)
    grid, ablation, placement, linkage = (
        read(folder, part) for part in ("grid", "ablation", "placement", "ward")
    )
    if any(result.accuracy for result in grid):
        written += _grid(folder, grid)
    if ablation:
        written.append(
            _text(
                folder / "ablation.md",
                [tables.ablation_table(ablation, DEFAULT), tables.remarks(ablation)],
            )
        )
    if linkage:
        written.append(
            _text(
                folder / "ward.md",
                [tables.ablation_table(linkage, ward.DEFAULT), tables.remarks(linkage)],
            )
        )
    if placement:
        written.append(
            _text(folder / "placement.md", [*_accuracies(placement), tables.remarks(placement)])
        )
    if not written:
        raise SettingError(
            f"there are no results in {folder}: run `python -m benchmarks.study --part grid`"
            " first, or give the"
            " right --out"
        )
    return written


def _grid(folder: Path, grid: list[Result]) -> list[Path]:
    when = [name for name in reversed(WHEN) if any(name in result.accuracy for result in grid)]
    parts = [
        table(grid, name)
        for name in when
        for table in (tables.accuracy_table, tables.difference_table)
    ]
    written = [_text(folder / "grid.md", [*parts, tables.remarks(grid)])]
    written.append(save(figures.accuracy_against_gmacs(grid), folder / "accuracy.png"))
    if times := read_times(folder / "times.csv"):
        written.append(save(figures.accuracy_against_time(grid, times), folder / "time.png"))
    if "after" in when:
        written.append(save(figures.accuracy_per_keep_rate(grid), folder / "keep_rates.png"))
        rates = tables.rates_of(grid)
        rate = min(rates, key=lambda rate: abs(rate - _DIVERSITY_RATE))
        written.append(
            save(figures.diversity_beside_accuracy(grid, rate), folder / "diversity.png")
        )
    return written


def _accuracies(results: list[Result]) -> list[str]:
    return [
        tables.accuracy_table(results, when)
        for when in WHEN
        if any(when in result.accuracy for result in results)
    ]


def _text(path: Path, parts: list[str]) -> Path:
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path
