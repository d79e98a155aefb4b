"""The comparison as a picture: how much faster for how much less work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdm_lightning.compare.table import Row

_MARKERS = "osD^vP*X<>ph"


def draw(path: str | Path, rows: Sequence[Row], title: str) -> None:
    """Speed-up over the plain model against GMACs, with quartiles, beside the curve of speed
    proportional to work.

    Args:
        path: of the PNG file.
        rows: the plain model first; methods without times are only named.
        title: what was measured.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.4, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    plain = rows[0].plain_macs / 1e9
    least = min(row.macs for row in rows) / 1e9
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
    for index, row in enumerate(rows):
        speed = row.speedup
        axes.errorbar(
            row.macs / 1e9,
            speed.median,
            yerr=[[speed.median - speed.q1], [speed.q3 - speed.median]],
            fmt=_MARKERS[index % len(_MARKERS)],
            color="black" if index == 0 else mpl.colormaps["tab10"]((index - 1) % 10),
            label=row.method if not row.settings else f"{row.method} ({row.settings})",
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            capsize=3,
            elinewidth=1,
            zorder=2 + index,
        )
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlabel("GMACs per image")
    axes.set_ylabel("throughput, × plain model")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
