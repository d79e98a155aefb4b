"""How our plots look: colours that a colour-blind reader tells apart, labels beside what they name,
and a white ground of their own, which stays readable on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The colours of Okabe and Ito (Color Universal Design, 2008), but for the yellow, which is too
#: pale on white.
BLACK, GREY = "#000000", "#7a7a7a"
VERMILION, ORANGE = "#d55e00", "#e69f00"
BLUE, SKY = "#0072b2", "#56b4e9"
GREEN, PURPLE = "#009e73", "#cc79a7"
COLOURS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)

_LETTERS = 8.5  # points


class Label(NamedTuple):
    """What is written beside a point.

    Attributes:
        x: of the point.
        y: of the point; what lies outside the axes is labelled at their edge.
        text: the label.
        colour: of the line from the point to the label.
    """

    x: float
    y: float
    text: str
    colour: str


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as can be to wanted ones (least squares) that keep a distance from each other.

    Where there is no room for the distance, they share what there is evenly.

    Args:
        wanted: places, in any order.
        gap: least distance between two.
        low: lowest place.
        high: highest place.

    Returns:
        A place for each, in the order of ``wanted``; equal ones keep that order too.

    >>> spread([0.5, 0.5, 0.1], 0.2, 0.0, 1.0)
    [0.4, 0.6, 0.1]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    # Less the distance due below it, each place may be no lower than the one before: blocks of
    # such as would be take their mean (pool adjacent violators).
    blocks: list[tuple[float, int]] = []
    for number, i in enumerate(order):
        mean, count = wanted[i] - number * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean = (before * members + mean * count) / (members + count)
            count += members
        blocks.append((mean, count))
    top = high - (len(wanted) - 1) * gap
    free = [min(max(mean, low), top) for mean, count in blocks for _ in range(count)]
    places = [0.0] * len(wanted)
    for number, (i, place) in enumerate(zip(order, free, strict=True)):
        places[i] = round(place + number * gap, 9)
    return places


def label_beside(
    axes: Axes, labels: Sequence[Label], side: Literal["left", "right"] = "right"
) -> None:
    """Write labels in a column beside the axes, none over another, each with a line from its point.

    To be called once the axes' limits are final.

    Args:
        axes: without ticks on that side.
        labels: in any order.
        side: where.
    """
    if not labels:
        return
    # Of equally high ones the farthest lowest: then their lines do not cross.
    labels = sorted(labels, key=lambda label: label.x, reverse=side == "left")
    to_axes = axes.transData + axes.transAxes.inverted()
    low, high = axes.get_ylim()
    inside = [min(max(label.y, low), high) for label in labels]
    wanted = [to_axes.transform((label.x, y))[1] for label, y in zip(labels, inside, strict=True)]
    figure = axes.get_figure()
    assert figure is not None
    # Titles and ticks take about a fifth of the height.
    gap = 1.25 * _LETTERS / 72 / (0.8 * figure.get_figheight())  # type: ignore[union-attr]
    places = spread(wanted, gap, 0.0, 1.0)
    x, align = (1.04, "left") if side == "right" else (-0.04, "right")
    for label, y, place in zip(labels, inside, places, strict=True):
        axes.annotate(
            label.text,
            (label.x, y),
            xytext=(x, place),
            textcoords="axes fraction",
            ha=align,
            va="center",
            fontsize=_LETTERS,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.8,
                "alpha": 0.8,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0.0 if side == "right" else 1.0, 0.5),
            },
            zorder=2,
        )


def new_figure(
    titles: Sequence[str], width: float, height: float, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side.

    Args:
        titles: of each panel.
        width: inches.
        height: inches.
        title: over all of them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    figure.patch.set(edgecolor="#c8ccd2", linewidth=1.5)
    if title:
        figure.suptitle(title, fontsize=10)
    axes = [figure.add_subplot(1, len(titles), place + 1) for place in range(len(titles))]
    for axis, name in zip(axes, titles, strict=True):
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG file; gives its path."""
    figure.savefig(path, dpi=150)
    return Path(path)
