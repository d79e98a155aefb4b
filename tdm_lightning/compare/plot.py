"""The comparison as pictures: how much faster for how much less work, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdm_lightning.compare.table import Row

_MARKERS = "osD^vP*X<>ph"


def draw(path: str | Path, rows: Sequence[Row], title: str) -> None:
    """Speed-up over the plain model against GMACs, with quartiles, beside the curve of speed
    proportional to work; a panel for each batch size.

    Args:
        path: of the PNG file.
        rows: at each batch size the plain model first; methods without times are only named.
        title: what was measured.
    """
    sizes = list(dict.fromkeys(row.batch for row in rows))
    figure, panels = _panels(len(sizes), title)
    for axes, size in zip(panels, sizes, strict=True):
        shown = [row for row in rows if row.batch == size]
        plain = shown[0].plain_macs / 1e9
        least = min(row.macs for row in shown) / 1e9
        low, high = least - 0.1 * (plain - least), plain * 1.03
        steps = [low + (high - low) * step / 200 for step in range(201)]
        axes.plot(
            steps,
            [plain / x for x in steps],
            color="0.6",
            linestyle="--",
            linewidth=1,
            label="as MACs predict",
            zorder=1,
        )
        for index, row in enumerate(shown):
            speed = row.speedup
            axes.errorbar(
                row.macs / 1e9,
                speed.median,
                yerr=[[speed.median - speed.q1], [speed.q3 - speed.median]],
                capsize=3,
                elinewidth=1,
                zorder=2 + index,
                **_point(index, row),
            )
        axes.set_xlim(low, high)
        axes.set_xlabel("GMACs per image")
        axes.set_ylabel(f"throughput at batch {size}, × plain model")
    _save(figure, panels, path)


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
    figure, panels = _panels(2, title)
    for axes, across in zip(panels, (_gmacs, _throughput), strict=True):
        for index, row in shown:
            axes.errorbar(across(row), 100 * row.top1, **_point(index, row))
        axes.set_ylabel("top-1 (%)")
    panels[0].set_xlabel("GMACs per image")
    panels[1].set_xlabel(f"images per second, measured at batch {size}")
    _save(figure, panels, path)


def rated(row: Row) -> bool:
    """Whether a row has an accuracy."""
    return not math.isnan(row.top1)


def _gmacs(row: Row) -> float:
    return row.macs / 1e9


def _throughput(row: Row) -> float:
    return row.throughput.median


def _panels(count: int, title: str) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 + 4.8 * count, 4.6), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _point(index: int, row: Row) -> dict[str, Any]:
    import matplotlib as mpl

    return {
        "fmt": _MARKERS[index % len(_MARKERS)],
        "color": "black" if index == 0 else mpl.colormaps["tab10"]((index - 1) % 10),
        "label": row.method if not row.settings else f"{row.method} ({row.settings})",
        "markersize": 7,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _save(figure: Any, panels: Sequence[Any], path: str | Path) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
