"""The study's results as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from benchmarks.study.results import WHEN, Result
from benchmarks.study.statistics import Difference, paired_difference
from tdm_lightning.core.tables import markdown

#: The method whose budgets all others get.
BUDGETS = "TDM"
#: The method that the others are compared with: the first of these that there is.
OURS = ("WardTDM", "TDM")
#: Up to this keep rate the mean difference over keep rates is taken.
LOW_RATES = 0.5
#: What a table or panel of accuracies is called.
TITLES = {"before": "without fine-tuning", "after": "after fine-tuning"}


def methods_of(results: Iterable[Result]) -> list[str]:
    """Names of the methods, in the order of their first results."""
    return list(dict.fromkeys(result.method for result in results))


def rates_of(results: Iterable[Result]) -> list[float]:
    """Keep rates of reduced models, the highest first."""
    return sorted({result.rate for result in results if result.rate < 1}, reverse=True)


def runs(results: Iterable[Result], method: str, rate: float, when: str) -> dict[int, Result]:
    """The runs of a method at a budget by seed."""
    return {
        result.seed: result
        for result in results
        if (result.method, result.rate) == (method, rate) and when in result.accuracy
    }


def mean_accuracy(results: Iterable[Result], method: str, rate: float, when: str) -> float:
    """Mean over seeds, in [0, 1]; NaN where there is no run."""
    found = runs(results, method, rate, when).values()
    return fmean(result.accuracy[when] for result in found) if found else math.nan


def difference(
    results: Sequence[Result], ours: str, theirs: str, rates: Sequence[float], when: str
) -> Difference | None:
    """Mean difference over keep rates; of each keep rate the seeds that both methods have.

    ``None`` where a keep rate has no seed in common.
    """
    first, second = [], []
    for rate in rates:
        mine, other = (runs(results, method, rate, when) for method in (ours, theirs))
        common = sorted(mine.keys() & other.keys())
        if not common:
            return None
        # Every keep rate counts once, whatever the number of its seeds.
        first.append([mine[seed].correct[when] for seed in common])
        second.append([other[seed].correct[when] for seed in common])
    times = math.lcm(*map(len, first))
    mine_all, other_all = (
        [run for group in side for run in group * (times // len(group))] for side in (first, second)
    )
    return paired_difference(mine_all, other_all)


def accuracy_table(results: Sequence[Result], when: str) -> str:
    """Accuracy in percent of each method at each of TDM's budgets, seeds averaged."""
    rates = rates_of(results)
    budgets = {r.rate: f" ({r.gmacs:.3f} G)" for r in results if r.method == BUDGETS}
    header = ["method", *(f"{rate:g}{budgets.get(rate, '')}" for rate in rates)]
    rows = []
    for method in methods_of(results):
        found = [mean_accuracy(results, method, rate, when) for rate in rates]
        if not all(map(math.isnan, found)):
            rows.append([method, *(_cell(results, method, rate, when) for rate in rates)])
    plain = mean_accuracy(results, "Plain", 1.0, when)
    beside = "" if math.isnan(plain) else f" The plain model: {100 * plain:.2f}."
    return (
        f"Top-1 accuracy (%), {TITLES[when]}, at the GMACs of TDM's keep"
        f" rates.{beside}\n\n{markdown(header, rows)}"
    )


def difference_table(results: Sequence[Result], when: str) -> str:
    """What our method is ahead of each other one, in points with 95 % intervals; bold where the
    interval excludes 0.
    """
    present = methods_of(results)
    ours = next(name for name in OURS if name in present)
    rates = rates_of(results)
    low = [rate for rate in rates if rate <= LOW_RATES]
    columns = [*([rate] for rate in rates), *([low] if len(low) > 1 else [])]
    header = [
        f"{ours} minus",
        *(f"{rate:g}" for rate in rates),
        *([f"mean of ≤ {LOW_RATES:g}"] if len(low) > 1 else []),
    ]
    rows = []
    for method in methods_of(results):
        if method in (ours, "Plain"):
            continue
        found = [difference(results, ours, method, column, when) for column in columns]
        if any(found):
            rows.append([method, *(_difference_cell(cell) for cell in found)])
    title = (
        f"{ours}'s lead in points of accuracy, {TITLES[when]}, with 95 % bootstrap intervals over"
        " images"
    )
    return f"{title}; bold: the interval excludes 0.\n\n{markdown(header, rows)}"


def ablation_table(results: Sequence[Result], default: str) -> str:
    """What each change is ahead of the default, per keep rate, before and after
    fine-tuning.
    """
    rates = rates_of(results)
    columns = [
        (rate, when)
        for when in WHEN
        for rate in rates
        if any(runs(results, method, rate, when) for method in methods_of(results))
    ]
    header = ["change", *(f"{rate:g}, {TITLES[when]}" for rate, when in columns)]
    rows = []
    for method in methods_of(results):
        if method == default:
            cells = [_cell(results, method, rate, when) + " %" for rate, when in columns]
        else:
            cells = [
                _difference_cell(difference(results, method, default, [rate], when))
                for rate, when in columns
            ]
        rows.append([method, *cells])
    rows.sort(key=lambda row: row[0] != default)
    title = (
        "Accuracy of the defaults, and the lead in points of each change over them with 95 %"
        " bootstrap intervals"
    )
    return f"{title}; bold: the interval excludes 0.\n\n{markdown(header, rows)}"


def remarks(results: Sequence[Result]) -> str:
    """How methods were treated otherwise than the others, and which budgets they could not meet."""
    notes = dict.fromkeys((result.method, result.facts.get("note", "")) for result in results)
    lines = [f"- {method}: {note}." for method, note in notes if note]
    lines += [
        f"- {result.method} has no setting at the budget of keep rate {result.rate:g}:"
        f" {result.facts.get('reason')}."
        for result in results
        if not result.accuracy and result.seed == 1
    ]
    return "\n".join(lines)


def _cell(results: Sequence[Result], method: str, rate: float, when: str) -> str:
    found = runs(results, method, rate, when)
    if not found:
        return "–"
    values = [100 * result.accuracy[when] for result in found.values()]
    spread = (
        f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 and when == "after" else ""
    )
    return f"{fmean(values):.2f}{spread}"


def _difference_cell(found: Difference | None) -> str:
    if found is None:
        return "–"
    text = f"{100 * found.mean:+.2f} ({100 * found.low:+.2f}, {100 * found.high:+.2f})"
    return f"**{text}**" if found.significant else text
