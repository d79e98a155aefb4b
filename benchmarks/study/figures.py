"""The study's figures, drawn from saved results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study.results import WHEN, Result
from benchmarks.study.tables import TITLES, mean_accuracy, methods_of, rates_of, runs
from tdm_lightning.compare.table import Quartiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour, marker and line: red tones merge for diversity among what is important, blue ones keep
#: what is important, green ones merge whatever is alike.
STYLES: dict[str, tuple[str, str, str]] = {
    "WardTDM": ("#9b2226", "o", "-"),
    "WardTDM (6 blocks)": ("#ae2012", "d", "--"),
    "WardTDM (12 blocks)": ("#bb3e03", "s", ":"),
    "TDM": ("#e5989b", "o", "-"),
    "TDM (4 blocks)": ("#c9184a", "o", "--"),
    "TDM (6 blocks)": ("#ff758f", "o", ":"),
    "DyViT+TDM": ("#f4a261", "s", "--"),
    "EViT": ("#1d4e89", "v", "-"),
    "DyViT": ("#6fa8dc", "s", "-"),
    "Evo-ViT": ("#674ea7", "P", "-"),
    "SPViT": ("#0b5394", "<", "--"),
    "SPViT+TDM": ("#d98880", "<", "--"),
    "PS-ViT": ("#9fc5e8", "h", "--"),
    "DPC-KNN": ("#38761d", "X", "-"),
    "ToMe": ("#7fb069", "*", "-"),
    "ToMe (rate)": ("#588157", "*", "--"),
    "PiToMe": ("#2a9d8f", "^", "-"),
    "MCTF": ("#457b9d", "s", "-"),
    "DiffRate": ("#8d99ae", "D", "-"),
    "ToFu": ("#b5838d", "v", "-"),
    "MaMe": ("#6a994e", "<", "-"),
    "MPM": ("#bc6c25", ">", "-"),
    "Random": ("#7f7f7f", "p", ":"),
    "Random (12 blocks)": ("#a0a0a0", "P", ":"),
}
_WIDTH = 10.0
#: So many points below the plain model end a panel; what lies lower would press all else together.
_REACH = 20.0


def accuracy_against_gmacs(results: Sequence[Result]) -> Figure:
    """Accuracy against multiply-accumulates, without and after fine-tuning."""
    shown = [name for name in WHEN if any(name in result.accuracy for result in results)]
    figure, axes = panels([TITLES[name] for name in shown], height=4.2)
    for axis, when in zip(axes, shown, strict=True):
        for method, style in _drawn(results):
            points = [
                (next(iter(found.values())).gmacs, *_spread(found.values(), when))
                for rate in rates_of(results)
                if (found := runs(results, method, rate, when))
            ]
            errorbar(axis, points, method, style)
        _plain_line(axis, results, when)
        _end_at(axis, 100 * mean_accuracy(results, "Plain", 1.0, when) - _REACH)
        axis.set_xlabel("GMACs per image, everything counted")
        axis.set_ylabel("top-1 accuracy (%)")
    legend(figure, axes)
    return figure


def accuracy_against_time(
    results: Sequence[Result], times: Mapping[tuple[str, float], Quartiles]
) -> Figure:
    """Accuracy against measured speed, as a multiple of the plain model's, without and after
    fine-tuning.
    """
    when = [name for name in WHEN if any(name in result.accuracy for result in results)]
    figure, axes = panels([f"{TITLES[name]}" for name in when], height=4.2)
    for axis, name in zip(axes, when, strict=True):
        for method, style in _drawn(results):
            points = [
                (times[method, rate].median, *_spread(found.values(), name))
                for rate in rates_of(results)
                if (method, rate) in times and (found := runs(results, method, rate, name))
            ]
            errorbar(axis, points, method, style)
        _plain_line(axis, results, name)
        _end_at(axis, 100 * mean_accuracy(results, "Plain", 1.0, name) - _REACH)
        axis.axvline(1, color="0.7", linewidth=0.8, zorder=1)
        axis.set_xlabel("images/s as a multiple of the plain model's, measured")
        axis.set_ylabel("top-1 accuracy (%)")
    legend(figure, axes)
    return figure


def accuracy_per_keep_rate(results: Sequence[Result]) -> Figure:
    """What the plain model's accuracy loses at the budget of each of TDM's keep rates, after
    fine-tuning.
    """
    figure, (axis,) = panels(("",), height=4.2, width=7.5)
    rates = rates_of(results)
    plain = mean_accuracy(results, "Plain", 1.0, "after")
    base = 0.0 if math.isnan(plain) else 100 * plain
    drawn = _drawn(results)
    for number, (method, style) in enumerate(drawn):
        shift = 0.6 * (
            (number + 0.5) / len(drawn) - 0.5
        )  # side by side, so that none hides another
        points = []
        for place, rate in enumerate(rates):
            if found := runs(results, method, rate, "after"):
                mean, below, above = _spread(found.values(), "after")
                points.append((place + shift, mean - base, below, above))
        errorbar(axis, points, method, style, line=False)
    for place in range(len(rates) - 1):
        axis.axvline(place + 0.5, color="0.85", linewidth=0.8, zorder=0)
    axis.axhline(0, color="black", linestyle="--", linewidth=1, zorder=1, label="Plain")
    _end_at(axis, -_REACH if base else math.nan)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_xlabel("TDM's keep rate; every method at its GMACs")
    axis.set_ylabel("accuracy against the plain model (points)" if base else "top-1 accuracy (%)")
    axis.grid(axis="x", visible=False)
    legend(figure, [axis])
    return figure


def diversity_beside_accuracy(results: Sequence[Result], rate: float) -> Figure:
    """Diversity score of the patch tokens after each block, beside the accuracy, at the budget of a
    keep rate.
    """
    figure, (left, right) = panels(
        (f"diversity at the budget of keep rate {rate:g}", "accuracy there, after fine-tuning"),
        height=4.2,
    )
    drawn = [
        (method, style) for method, style in _drawn(results) if runs(results, method, rate, "after")
    ]
    plain = runs(results, "Plain", 1.0, "after")
    for result in plain.values():
        left.plot(_per_token(result), color="black", linestyle="--", linewidth=1.2, label="Plain")
    for method, (colour, marker, line) in drawn:
        result = next(iter(runs(results, method, rate, "after").values()))
        left.plot(
            _per_token(result),
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            linewidth=1.4,
            label=method,
        )
    left.set_xlabel("after block (from 0)")
    left.set_ylabel("diversity score ÷ number of tokens")
    left.set_ylim(bottom=0)
    order = sorted(drawn, key=lambda item: mean_accuracy(results, item[0], rate, "after"))
    end = 100 * mean_accuracy(results, "Plain", 1.0, "after") - _REACH
    for place, (method, (colour, marker, _)) in enumerate(order):
        mean, below, above = _spread(runs(results, method, rate, "after").values(), "after")
        if mean < end:  # off the scale: its value stands at the edge
            right.annotate(
                f"← {mean:.2f}",
                (end, place),
                xytext=(4, -3),
                textcoords="offset points",
                fontsize=8,
                color=colour,
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
        )
    right.set_yticks(range(len(order)), [method for method, _ in order])
    right.set_ylim(-0.6, len(order) - 0.3)
    _plain_line(right, results, "after", vertical=True)
    if not math.isnan(end):
        right.set_xlim(left=end)
    right.set_xlabel("top-1 accuracy (%)")
    legend(figure, [left])
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG file; gives its path."""
    figure.savefig(path, dpi=150)
    return path


def panels(
    titles: Sequence[str], height: float, width: float = _WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, len(titles), place + 1) for place in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _drawn(results: Sequence[Result]) -> list[tuple[str, tuple[str, str, str]]]:
    """Methods with their styles, in the styles' order."""
    present = set(methods_of(results))
    return [(method, style) for method, style in STYLES.items() if method in present]


def _spread(found: Any, when: str) -> tuple[float, float, float]:
    """Mean in percent over seeds, and how far the lowest and the highest lie from it."""
    values = [100 * result.accuracy[when] for result in found]
    mean = sum(values) / len(values)
    return mean, mean - min(values), max(values) - mean


def errorbar(
    axis: Axes, points: Sequence[Any], label: str, style: tuple[str, str, str], line: bool = True
) -> None:
    """Draw points (x, y, below, above) of one method."""
    if not points:
        return
    colour, marker, dashes = style
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
        label=label,
        zorder=4 if label == "WardTDM" else 3,
    )


def _end_at(axis: Axes, end: float) -> None:
    """End a panel from below, with the values of what lies lower at its edge; NaN: leave it as it
    is.
    """
    if math.isnan(end):
        return
    left, right = axis.get_xlim()
    written: list[float] = []
    for drawn in axis.containers:
        line, *_ = drawn
        for x, y in zip(*line.get_data(), strict=True):
            if y < end:
                beside = sum(
                    abs(x - other) < 0.06 * (right - left) for other in written
                )  # one above the other
                offset = (0, 4 + 11 * beside)
                label = axis.annotate(
                    f"↓ {y:.1f}",
                    (x, end),
                    xytext=offset,
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
                label.set_color(line.get_color())
                written.append(x)
    axis.set_ylim(bottom=end)


def _plain_line(axis: Axes, results: Sequence[Result], when: str, vertical: bool = False) -> None:
    plain = mean_accuracy(results, "Plain", 1.0, when)
    if not math.isnan(plain):
        draw = axis.axvline if vertical else axis.axhline
        draw(100 * plain, color="black", linestyle="--", linewidth=1, zorder=1, label="Plain")


def _per_token(result: Result) -> list[float]:
    found = zip(result.diversity["after"], result.tokens, strict=True)
    return [score / count if count else math.nan for score, count in found]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, beside them."""
    entries = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(entries.values()), list(entries), loc="outside right upper", fontsize=8, frameon=False
    )
