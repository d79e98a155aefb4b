"""The comparison as a table: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.table import Table

from tdm_lightning.core import tables


class Quartiles(NamedTuple):
    """The quartiles of some numbers; the second is their median. NaN where there are none."""

    q1: float = math.nan
    median: float = math.nan
    q3: float = math.nan

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """The quartiles, linear between neighbours.

        >>> Quartiles.of([1.0, 2.0, 3.0, 4.0, 9.0])
        Quartiles(q1=2.0, median=3.0, q3=4.0)
        """
        if not values:
            return cls()
        found = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(*found.tolist())


_UNKNOWN = Quartiles()


@dataclass(frozen=True)
class Row:
    """One method at one batch size; NaN where something was not measured.

    Attributes:
        method: its name.
        settings: its arguments.
        batch: images in a pass.
        parameters: number of them, the strategy's own included.
        macs: multiply-accumulates per image.
        plain_macs: those of the plain model.
        run_macs: all that a pass does, see :attr:`tdm_lightning.flops.MACReport.forward`.
        macs_alone: mean over images of what each costs by itself, for adaptive methods.
        macs_alone_std: their standard deviation.
        throughput: images per second.
        speedup: throughput as a multiple of the plain model's in the same round.
        limit_speedup: the same as a multiple of free slicing's.
        time: milliseconds for a pass.
        step: milliseconds for a forward and backward pass in training mode.
        step_speedup: how many times faster than the plain model's, in the same round.
        launches: what a pass gives the device to do, see
            :func:`~tdm_lightning.compare.launches.counted`.
        memory: peak bytes of a pass, weights included.
        saved: bytes that a pass saves for its backward pass.
        plain_saved: those of the plain model.
        own_time: share of a pass that is spent in the strategy's hooks.
        top1: accuracy in [0, 1].
    """

    method: str
    settings: str
    batch: int
    parameters: int
    macs: int
    plain_macs: int
    run_macs: int
    throughput: Quartiles = _UNKNOWN
    speedup: Quartiles = _UNKNOWN
    limit_speedup: Quartiles = _UNKNOWN
    time: Quartiles = _UNKNOWN
    step: Quartiles = _UNKNOWN
    step_speedup: Quartiles = _UNKNOWN
    launches: float = math.nan
    memory: float = math.nan
    saved: float = math.nan
    plain_saved: float = math.nan
    own_time: float = math.nan
    macs_alone: float = math.nan
    macs_alone_std: float = math.nan
    top1: float = math.nan

    @property
    def reduction(self) -> float:
        """Share of the plain model's multiply-accumulates that is saved."""
        return 1 - self.macs / self.plain_macs

    @property
    def mac_ratio(self) -> float:
        """The speed-up if time were proportional to all multiply-accumulates that run."""
        return self.plain_macs / self.run_macs

    @property
    def efficiency(self) -> float:
        """How much of that the measured speed-up reaches."""
        return self.speedup.median / self.mac_ratio


_LEFT = 2  # columns of text


def markdown(rows: Sequence[Row], facts: Mapping[str, str], remarks: Sequence[str] = ()) -> str:
    """The table with what it depends on above it and remarks below."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", tables.markdown(*_cells(rows), left=_LEFT)]
    lines += ["", *(f"- {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


def rich_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    return tables.terminal(*_cells(rows), left=_LEFT)


def csv_text(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """All numbers in full, empty where not measured; the last columns say what they depend on, the
    same in every line.
    """
    return tables.csv_text([{**_numbers(row), **facts} for row in rows])


def _numbers(row: Row) -> dict[str, str | float]:
    numbers: dict[str, str | float] = {
        "method": row.method,
        "settings": row.settings,
        "batch_size": row.batch,
        "parameters": row.parameters,
        "macs": row.macs,
        "run_macs": row.run_macs,
        "reduction": row.reduction,
        "mac_ratio": row.mac_ratio,
    }
    timed = {
        "images_per_second": row.throughput,
        "ratio_to_plain": row.speedup,
        "ratio_to_free_slicing": row.limit_speedup,
        "batch_ms": row.time,
        "training_step_ms": row.step,
        "training_step_ratio_to_plain": row.step_speedup,
    }
    for name, found in timed.items():
        numbers |= {name: found.median, f"{name}_q1": found.q1, f"{name}_q3": found.q3}
    return {
        **numbers,
        "ratio_over_mac_ratio": row.efficiency,
        "own_time": row.own_time,
        "launches": row.launches,
        "peak_bytes": row.memory,
        "saved_bytes": row.saved,
        "macs_alone": row.macs_alone,
        "macs_alone_std": row.macs_alone_std,
        "top1": row.top1,
    }


def _cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Titles, and every row's cells; the limit, training steps and accuracy only where some row has
    one.
    """
    limited = any(not math.isnan(row.limit_speedup.median) for row in rows)
    trained = any(not math.isnan(row.step.median) for row in rows)
    rated = any(not math.isnan(row.top1) for row in rows)
    header = (
        "method",
        "settings",
        "batch",
        "params (M)",
        "GMACs",
        "run",
        "reduction",
        "images/s (quartiles)",
        "ms",
        "× plain (quartiles)",
        "÷ MAC ratio",
        *(["× free slicing"] if limited else []),
        *(["training step ms (× plain)"] if trained else []),
        "own time",
        "launches",
        "peak MiB",
        "saved for backward MiB (× plain)",
        *(["top-1 (%)"] if rated else []),
    )
    cells = [
        [
            row.method,
            row.settings,
            str(row.batch),
            f"{row.parameters / 1e6:.2f}",
            _gmacs(row.macs),
            _gmacs(row.run_macs),
            f"{row.reduction:.1%}",
            _quartiles(row.throughput, 1),
            _number(row.time.median, 2),
            _quartiles(row.speedup, 2),
            _number(row.efficiency, 2),
            *([_number(row.limit_speedup.median, 2)] if limited else []),
            *([_step(row)] if trained else []),
            "–" if math.isnan(row.own_time) else f"{row.own_time:.1%}",
            _number(row.launches, 0),
            _number(row.memory / 2**20, 1),
            _saved(row),
            *([_number(100 * row.top1, 2)] if rated else []),
        ]
        for row in rows
    ]
    return header, cells


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _gmacs(macs: int) -> str:
    return f"{macs / 1e9:.3f}" if macs >= 1e8 else f"{macs / 1e9:.3g}"


def _quartiles(found: Quartiles, digits: int) -> str:
    if math.isnan(found.median):
        return "–"
    return f"{found.median:.{digits}f} ({found.q1:.{digits}f}–{found.q3:.{digits}f})"


def _saved(row: Row) -> str:
    return (
        "–"
        if math.isnan(row.saved)
        else f"{row.saved / 2**20:.1f} ({row.saved / row.plain_saved:.2f})"
    )


def _step(row: Row) -> str:
    if math.isnan(row.step.median):
        return "–"
    return f"{row.step.median:.0f} ({row.step_speedup.median:.2f})"
