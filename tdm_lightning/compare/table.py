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
    """One method's line; NaN where something was not measured.

    Attributes:
        method: its name.
        settings: its arguments.
        parameters: number of them, the strategy's own included.
        macs: multiply-accumulates per image.
        plain_macs: those of the plain model.
        single_macs: those of the one image whose latency is timed.
        macs_alone: mean over images of what each costs by itself, for adaptive methods.
        macs_alone_std: their standard deviation.
        throughput: images per second.
        speedup: throughput as a multiple of the plain model's in the same round.
        latency: milliseconds for one image.
        latency_speedup: how many times faster than the plain model with one image, in the same
            round.
        step: milliseconds for a forward and backward pass of the batch in training mode.
        step_speedup: how many times faster than the plain model's, in the same round.
        memory: peak bytes of a pass of the batch, weights included.
        saved: bytes that a pass of the batch saves for its backward pass.
        plain_saved: those of the plain model.
        own_time: share of a pass of the batch that is spent in the strategy's hooks.
        latency_own_time: the same for one image alone.
        top1: accuracy in [0, 1].
    """

    method: str
    settings: str
    parameters: int
    macs: int
    plain_macs: int
    single_macs: int
    throughput: Quartiles = _UNKNOWN
    speedup: Quartiles = _UNKNOWN
    latency: Quartiles = _UNKNOWN
    latency_speedup: Quartiles = _UNKNOWN
    step: Quartiles = _UNKNOWN
    step_speedup: Quartiles = _UNKNOWN
    memory: float = math.nan
    saved: float = math.nan
    plain_saved: float = math.nan
    own_time: float = math.nan
    latency_own_time: float = math.nan
    macs_alone: float = math.nan
    macs_alone_std: float = math.nan
    top1: float = math.nan

    @property
    def reduction(self) -> float:
        """Share of the plain model's multiply-accumulates that is saved."""
        return 1 - self.macs / self.plain_macs

    @property
    def mac_ratio(self) -> float:
        """The speed-up if time were proportional to multiply-accumulates."""
        return self.plain_macs / self.macs

    @property
    def efficiency(self) -> float:
        """How much of that the measured speed-up reaches."""
        return self.speedup.median / self.mac_ratio

    @property
    def latency_efficiency(self) -> float:
        """The same for one image, by its own multiply-accumulates."""
        return self.latency_speedup.median * self.single_macs / self.plain_macs


#: Titles of the printed columns.
_HEADER = (
    "method",
    "settings",
    "params (M)",
    "GMACs",
    "reduction",
    "images/s (quartiles)",
    "× plain (quartiles)",
    "÷ MAC ratio",
    "batch-1 ms (× plain)",
    "batch-1 ÷ MAC ratio",
    "own time (batch 1)",
    "peak MiB",
    "saved for backward MiB (× plain)",
)
_LEFT = 2  # columns of text
_STEP = _HEADER.index(
    "own time (batch 1)"
)  # before this one stands the training step, where it was timed


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
        "parameters": row.parameters,
        "macs": row.macs,
        "reduction": row.reduction,
        "mac_ratio": row.mac_ratio,
    }
    timed = {
        "images_per_second": row.throughput,
        "ratio_to_plain": row.speedup,
        "batch1_ms": row.latency,
        "batch1_ratio_to_plain": row.latency_speedup,
        "training_step_ms": row.step,
        "training_step_ratio_to_plain": row.step_speedup,
    }
    for name, found in timed.items():
        numbers |= {name: found.median, f"{name}_q1": found.q1, f"{name}_q3": found.q3}
    return {
        **numbers,
        "ratio_over_mac_ratio": row.efficiency,
        "batch1_macs": row.single_macs,
        "batch1_ratio_over_mac_ratio": row.latency_efficiency,
        "own_time": row.own_time,
        "batch1_own_time": row.latency_own_time,
        "peak_bytes": row.memory,
        "saved_bytes": row.saved,
        "macs_alone": row.macs_alone,
        "macs_alone_std": row.macs_alone_std,
        "top1": row.top1,
    }


def _cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Titles, and every row's cells; training steps and accuracy only where some method has one."""
    rated = any(not math.isnan(row.top1) for row in rows)
    trained = any(not math.isnan(row.step.median) for row in rows)
    cells = [
        [
            row.method,
            row.settings,
            f"{row.parameters / 1e6:.2f}",
            _gmacs(row.macs),
            f"{row.reduction:.1%}",
            _quartiles(row.throughput, 1),
            _quartiles(row.speedup, 2),
            _number(row.efficiency, 2),
            _latency(row.latency, row.latency_speedup, 2),
            _number(row.latency_efficiency, 2),
            *([_latency(row.step, row.step_speedup, 0)] if trained else []),
            "–" if math.isnan(row.own_time) else f"{row.own_time:.1%} ({row.latency_own_time:.1%})",
            _number(row.memory / 2**20, 1),
            _saved(row),
            *([_number(100 * row.top1, 2)] if rated else []),
        ]
        for row in rows
    ]
    step = ("training step ms (× plain)",) if trained else ()
    return (*_HEADER[:_STEP], *step, *_HEADER[_STEP:], *(["top-1 (%)"] if rated else [])), cells


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


def _latency(time: Quartiles, speedup: Quartiles, digits: int) -> str:
    if math.isnan(time.median):
        return "–"
    return f"{time.median:.{digits}f} ({speedup.median:.2f})"
