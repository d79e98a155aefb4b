"""The study's figures, drawn from saved results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.study.results import WHEN, Result
from benchmarks.study.tables import TITLES, mean_accuracy, methods_of, rates_of, runs
from tdm_lightning.compare.table import Quartiles
from tdm_lightning.visualize.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Label,
    label_beside,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour, marker and line. A colour for each kind: vermilion and orange merge for diversity among
#: what is important, blue keeps what is important, green merges whatever is alike, sky image by
#: image, purple weighs several things, grey chooses by chance.
STYLES: dict[str, tuple[str, str, str]] = {
    "WardTDM": (VERMILION, "o", "-"),
    "WardTDM (6 blocks)": (VERMILION, "d", "--"),
    "WardTDM (12 blocks)": (VERMILION, "s", ":"),
    "TDM": (ORANGE, "o", "-"),
    "TDM (4 blocks)": (ORANGE, "d", "--"),
    "TDM (6 blocks)": (ORANGE, "s", ":"),
    "DyViT+TDM": (ORANGE, "^", "--"),
    "EViT": (BLUE, "v", "-"),
    "TopK": (BLUE, "^", "--"),
    "DyViT": (BLUE, "s", "--"),
    "Evo-ViT": (BLUE, "P", "-."),
    "SPViT": (BLUE, "<", ":"),
    "SPViT+TDM": (ORANGE, "<", "-."),
    "PS-ViT": (BLUE, "h", "-."),
    "DPC-KNN": (GREEN, "X", ":"),
    "ToMe": (GREEN, "*", "-"),
    "ToMe (rate)": (GREEN, "*", "--"),
    "PiToMe": (GREEN, "^", "-."),
    "MCTF": (PURPLE, "s", "-"),
    "DiffRate": (PURPLE, "D", "--"),
    "ToFu": (PURPLE, "v", ":"),
    "MaMe": (SKY, "<", "-"),
    "MPM": (SKY, ">", "--"),
    "Random": (GREY, "p", ":"),
    "Random (12 blocks)": (GREY, "P", "--"),
}
#: Inches of a panel, its labels beside it.
_WIDTH, _HEIGHT = 6.6, 4.8
#: So many points below the plain model end a panel; what lies lower would press all else together.
_REACH = 20.0
#: Points x, y and how far their spread reaches below and above, by method.
Points = dict[str, list[tuple[float, float, float, float]]]


def accuracy_against_gmacs(results: Sequence[Result]) -> Figure:
    """Accuracy against multiply-accumulates, without and after fine-tuning."""
    shown = _when(results)
    figure, axes = panels([TITLES[name] for name in shown])
    for axis, when in zip(axes, shown, strict=True):
        found = {
            method: [
                (next(iter(cell.values())).gmacs, *_spread(cell.values(), when))
                for rate in rates_of(results)
                if (cell := runs(results, method, rate, when))
            ]
            for method in _drawn(results)
        }
        axis.set_xlabel("GMACs per image, everything counted")
        _accuracies(axis, results, when, found, side="left")
    return figure


def accuracy_against_time(
    results: Sequence[Result], times: Mapping[tuple[str, float], Quartiles]
) -> Figure:
    """Accuracy against measured speed, as a multiple of the plain model's, without and after
    fine-tuning.
    """
    shown = _when(results)
    figure, axes = panels([TITLES[name] for name in shown])
    for axis, when in zip(axes, shown, strict=True):
        found = {
            method: [
                (times[method, rate].median, *_spread(cell.values(), when))
                for rate in rates_of(results)
                if (method, rate) in times and (cell := runs(results, method, rate, when))
            ]
            for method in _drawn(results)
        }
        axis.axvline(1, color="0.7", linewidth=0.8, zorder=1)
        axis.set_xlabel("images/s as a multiple of the plain model's, measured")
        _accuracies(axis, results, when, found, side="right")
    return figure


def accuracy_per_keep_rate(results: Sequence[Result]) -> Figure:
    """What the plain model's accuracy loses at the budget of each of TDM's keep rates, after
    fine-tuning.
    """
    figure, (axis,) = panels([""], width=8.5)
    rates = rates_of(results)
    plain = mean_accuracy(results, "Plain", 1.0, "after")
    base = 0.0 if math.isnan(plain) else 100 * plain
    end = -_REACH if base else math.nan
    drawn = _drawn(results)
    found: Points = {}
    for number, method in enumerate(drawn):
        # Side by side, so that none hides another.
        shift = 0.6 * ((number + 0.5) / len(drawn) - 0.5)
        found[method] = []
        for place, rate in enumerate(rates):
            if cell := runs(results, method, rate, "after"):
                mean, below, above = _spread(cell.values(), "after")
                found[method].append((place + shift, mean - base, below, above))
        errorbar(axis, found[method], method, line=False)
    for place in range(len(rates) - 1):
        axis.axvline(place + 0.5, color="0.85", linewidth=0.8, zorder=0)
    axis.axhline(0, color="black", linestyle="--", linewidth=1, zorder=1)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_xlim(-0.5, len(rates) - 0.5)
    axis.set_xlabel("TDM's keep rate; every method at its GMACs")
    axis.set_ylabel("accuracy against the plain model (points)" if base else "top-1 accuracy (%)")
    axis.grid(axis="x", visible=False)
    if base:
        _end_at(axis, found, end)
        _name_below(axis, found, end, len(rates) - 1)
    last = {
        method: points[-1:]
        for method, points in found.items()
        if points and round(points[-1][0]) == len(rates) - 1
    }
    labels = end_labels(last, end, "right")
    label_beside(axis, [*labels, Label(len(rates) - 0.5, 0, "Plain", BLACK)] if base else labels)
    return figure


def diversity_beside_accuracy(results: Sequence[Result], rate: float) -> Figure:
    """Diversity score of the patch tokens after each block, beside the accuracy, at the budget of a
    keep rate.
    """
    figure, (left, right) = panels(
        [f"diversity at the budget of keep rate {rate:g}", "accuracy there, after fine-tuning"]
    )
    drawn = [method for method in _drawn(results) if runs(results, method, rate, "after")]
    labels = []
    for result in runs(results, "Plain", 1.0, "after").values():
        scores = _per_token(result)
        left.plot(scores, color=BLACK, linestyle="--", linewidth=1.2)
        labels = [Label(*_last(scores), "Plain", BLACK)]  # one for all seeds
    for method in drawn:
        scores = _per_token(next(iter(runs(results, method, rate, "after").values())))
        errorbar(left, [(x, y, 0, 0) for x, y in enumerate(scores)], method)
        labels.append(Label(*_last(scores), method, STYLES[method][0]))
    left.set_xlabel("after block (from 0)")
    left.set_ylabel("diversity score ÷ number of tokens")
    left.set_ylim(bottom=0)
    label_beside(left, labels)
    order = sorted(drawn, key=lambda method: mean_accuracy(results, method, rate, "after"))
    end = 100 * mean_accuracy(results, "Plain", 1.0, "after") - _REACH
    for place, method in enumerate(order):
        colour, marker, _ = STYLES[method]
        mean, below, above = _spread(runs(results, method, rate, "after").values(), "after")
        if mean < end:  # off the scale: its value stands at the edge
            right.annotate(
                f"← {mean:.2f}",
                (end, place),
                xytext=(4, -3),
                textcoords="offset points",
                fontsize=8,
            )
            continue
        right.errorbar(
            mean,
            place,
            xerr=[[below], [above]],
            color=colour,
            marker=marker,
            markersize=8,
            capsize=2,
        )
        right.annotate(
            f"{mean:.2f}",
            (mean, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # before the plain line
        )
    right.set_yticks(range(len(order)), order)
    right.set_ylim(-0.6, len(order) - 0.3)
    plain = mean_accuracy(results, "Plain", 1.0, "after")
    if not math.isnan(plain):
        right.axvline(100 * plain, color="black", linestyle="--", linewidth=1, zorder=1)
        lowest = 100 * mean_accuracy(results, order[0], rate, "after")
        room = 0.15 * min(_REACH, 100 * plain - lowest)  # for the values over the points
        right.set_xlim(max(end, lowest - room), 100 * plain + room)
        right.annotate(
            "Plain",
            (100 * plain, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    right.set_xlabel("top-1 accuracy (%)")
    return figure


def panels(titles: Sequence[str], width: float = _WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure with panels of so many inches side by side."""
    return new_figure(titles, width * len(titles), _HEIGHT)


def errorbar(axis: Axes, points: Sequence[Any], method: str, line: bool = True) -> None:
    """Draw points (x, y, below, above) of one method."""
    if not points:
        return
    colour, marker, dashes = STYLES[method]
    x, y, below, above = zip(*sorted(points), strict=True)
    axis.errorbar(
        x,
        y,
        yerr=[below, above],
        color=colour,
        marker=marker,
        linestyle=dashes if line else "none",
        linewidth=1.4,
        markersize=8 if marker == "*" else 6,
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=1,
        capsize=2,
        zorder=4 if method == "WardTDM" else 3,
    )


def end_labels(found: Points, end: float, side: Literal["left", "right"]) -> list[Label]:
    """The name of each method for the point at one side; its value too where that lies below the
    end of the panel.
    """
    labels = []
    for method, points in found.items():
        if points:
            line = [(x, y) for x, y, *_ in sorted(points, reverse=side == "right")]
            x, y = line[0]
            text = method if not y < end else f"{method} {_below(y)}"
            labels.append(Label(_leaves(line, end) if y < end else x, y, text, STYLES[method][0]))
    return labels


def _leaves(line: Sequence[tuple[float, float]], end: float) -> float:
    """Where a line whose first point lies below the end of the panel leaves it; where it never is
    in it, its first point's place.
    """
    for (x, y), (inner, above) in pairwise(line):
        if above >= end:
            return x + (inner - x) * (end - y) / (above - y)
    return line[0][0]


def _below(y: float) -> str:
    return f"↓ {y:.1f}".replace("-", "−")


def axis_at_right(axis: Axes) -> None:
    """The vertical axis on the right, so that labels can stand on the left."""
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.spines["left"].set_visible(False)
    axis.spines["right"].set_visible(True)


def _accuracies(
    axis: Axes, results: Sequence[Result], when: str, found: Points, side: Literal["left", "right"]
) -> None:
    for method, points in found.items():
        errorbar(axis, points, method)
    axis.set_ylabel("top-1 accuracy (%)")
    if side == "left":
        axis_at_right(axis)
    low, high = axis.get_xlim()
    if high - low < 0.2 * high:  # one budget alone: what differs by a hundredth lies close together
        axis.set_xlim(low - 0.1 * high, high + 0.1 * high)
    plain, labels = 100 * mean_accuracy(results, "Plain", 1.0, when), []
    if not math.isnan(plain):
        axis.axhline(plain, color="black", linestyle="--", linewidth=1, zorder=1)
        _end_at(axis, found, plain - _REACH)
        edge = axis.get_xlim()[0 if side == "left" else 1]
        labels.append(Label(edge, plain, "Plain", BLACK))
    label_beside(axis, [*labels, *end_labels(found, plain - _REACH, side)], side)


def _end_at(axis: Axes, found: Points, end: float) -> None:
    """End a panel from below if anything lies lower."""
    if any(y < end for points in found.values() for _, y, *_ in points):
        axis.set_ylim(bottom=end)


def _name_below(axis: Axes, found: Points, end: float, before: int) -> None:
    """Names and values at the lower edge, one above the other, of what lies below it in the
    columns before the last.
    """
    for column in range(before):
        names = [
            f"{method} {_below(y)}"
            for method, points in found.items()
            for x, y, *_ in points
            if round(x) == column and y < end
        ]
        for number, name in enumerate(names):
            axis.annotate(
                name,
                (column, end),
                xytext=(0, 4 + 11 * number),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )


def _when(results: Sequence[Result]) -> list[str]:
    return [name for name in WHEN if any(name in result.accuracy for result in results)]


def _drawn(results: Sequence[Result]) -> list[str]:
    """Methods in the styles' order."""
    present = set(methods_of(results))
    return [method for method in STYLES if method in present]


def _spread(found: Any, when: str) -> tuple[float, float, float]:
    """Mean in percent over seeds, and how far the lowest and the highest lie from it."""
    values = [100 * result.accuracy[when] for result in found]
    mean = sum(values) / len(values)
    return mean, mean - min(values), max(values) - mean


def _last(scores: Sequence[float]) -> tuple[int, float]:
    """The last block that has a score, and the score: after PS-ViT's last no patch is left."""
    return [(block, score) for block, score in enumerate(scores) if not math.isnan(score)][-1]


def _per_token(result: Result) -> list[float]:
    found = zip(result.diversity["after"], result.tokens, strict=True)
    return [score / count if count else math.nan for score, count in found]
