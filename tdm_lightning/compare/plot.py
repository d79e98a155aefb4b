"""The comparison as pictures: how much faster for how much less work, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdm_lightning.compare.table import Row
from tdm_lightning.visualize.plots import (
    BLACK,
    COLOURS,
    GREY,
    Label,
    label_beside,
    new_figure,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*X<>ph"
#: Inches of a panel, the names beside it.
_WIDTH, _HEIGHT = 7.0, 4.8


def draw(path: str | Path, rows: Sequence[Row], title: str) -> None:
    """Speed-up over the plain model against GMACs, with quartiles, beside the curve of speed
    proportional to work; a panel for each batch size, names beside it.

    Args:
        path: of the PNG file.
        rows: at each batch size the plain model first; methods without times are left out.
        title: what was measured.
    """
    sizes = list(dict.fromkeys(row.batch for row in rows))
    title = f"{title}\ndashed: as multiply-accumulates predict"
    figure, panels = new_figure([""] * len(sizes), _WIDTH * len(sizes), _HEIGHT, title)
    for axes, size in zip(panels, sizes, strict=True):
        shown = [row for row in rows if row.batch == size]
        plain = shown[0].plain_macs / 1e9
        least = min(row.macs for row in shown) / 1e9
        low, high = least - 0.1 * (plain - least), plain * 1.03
        steps = [low + (high - low) * step / 200 for step in range(201)]
        curve = [plain / x for x in steps]
        axes.plot(steps, curve, color=GREY, linestyle="--", linewidth=1, zorder=1)
        for index, row in enumerate(shown):
            speed = row.speedup
            axes.errorbar(
                row.macs / 1e9,
                speed.median,
                yerr=[[speed.median - speed.q1], [speed.q3 - speed.median]],
                capsize=3,
                elinewidth=1,
                zorder=3 + index,
                **_point(index),
            )
        axes.set_xlim(low, high)
        axes.set_xlabel("GMACs per image")
        axes.set_ylabel(f"throughput at batch {size}, × plain model")
        _name(axes, [(row.macs / 1e9, row.speedup.median, i, row) for i, row in enumerate(shown)])
    save(figure, path)


def draw_accuracy(path: str | Path, rows: Sequence[Row], title: str) -> None:
    """Top-1 against GMACs, beside top-1 against images per second of this machine at the largest
    batch.

    Args:
        path: of the PNG file.
        rows: at each batch size the plain model first; methods without top-1 are left out.
        title: what was measured.
    """
    size = max(row.batch for row in rows)
    shown = [(i, r) for i, r in enumerate(row for row in rows if row.batch == size) if rated(r)]
    figure, panels = new_figure([""] * 2, 2 * _WIDTH, _HEIGHT, title)
    for axes, across in zip(panels, (_gmacs, _throughput), strict=True):
        for index, row in shown:
            axes.errorbar(across(row), 100 * row.top1, **_point(index))
        axes.set_ylabel("top-1 (%)")
        _name(axes, [(across(row), 100 * row.top1, index, row) for index, row in shown])
    panels[0].set_xlabel("GMACs per image")
    panels[1].set_xlabel(f"images per second, measured at batch {size}")
    save(figure, path)


def rated(row: Row) -> bool:
    """Whether a row has an accuracy."""
    return not math.isnan(row.top1)


def _gmacs(row: Row) -> float:
    return row.macs / 1e9


def _throughput(row: Row) -> float:
    return row.throughput.median


def _colour(index: int) -> str:
    return BLACK if index == 0 else COLOURS[(index - 1) % len(COLOURS)]


def _point(index: int) -> dict[str, Any]:
    return {
        "fmt": _MARKERS[index % len(_MARKERS)],
        "color": _colour(index),
        "markersize": 7,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _name(axes: Axes, points: Sequence[tuple[float, float, int, Row]]) -> None:
    """Write methods and settings beside the panel."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6))
    labels = []
    for x, y, index, row in points:
        if not math.isnan(y):
            name = row.method if not row.settings else f"{row.method} ({row.settings})"
            labels.append(Label(x, y, name, _colour(index)))
    label_beside(axes, labels)
