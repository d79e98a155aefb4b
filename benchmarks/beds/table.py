"""Methods as rows, beds and budgets as columns, and what WardTDM is ahead of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.fidelity.table import read as read_fidelity
from benchmarks.study import tables
from benchmarks.study.plan import METHODS
from benchmarks.study.results import Result, read
from benchmarks.study.statistics import Difference, paired_difference
from tdm_lightning.core.tables import markdown

OURS = "WardTDM"
#: Budgets that stand in the table, as TDM's keep rates.
RATES = (0.7, 0.5, 0.3, 0.2)
#: Folders of a bed by what was done with the model, and what they are called.
RECIPES = {
    "free": "training-free",
    "3000": "fine-tuned on 3,000 images",
    "3000-distilled": "fine-tuned on 3,000 images with distillation",
    "10000": "fine-tuned on 10,000 images",
    "10000-distilled": "fine-tuned on 10,000 images with distillation",
}
BEDS = {"garments": "Fashion-MNIST", "scenes": "Scenes"}


@dataclass(frozen=True)
class Column:
    """One bed at one budget.

    Attributes:
        bed: its name.
        recipe: what was done with the model.
        rate: TDM's keep rate whose budget the methods have.
        values: what to show of each method.
        leads: what :data:`OURS` is better by than each other method, positive: better.
    """

    bed: str
    recipe: str
    rate: float
    values: dict[str, float] = field(default_factory=dict)
    leads: dict[str, Difference] = field(default_factory=dict)


def collected(folder: Path) -> list[Column]:
    """The columns of all beds that there are results of."""
    found = []
    for bed, title in BEDS.items():
        for recipe, name in RECIPES.items():
            found += _accuracies(title, name, read(folder / bed / recipe, "grid"))
    return found + _distortions(folder / "fidelity" / "fidelity.csv")


def text(columns: Sequence[Column]) -> str:
    """A Markdown table for each recipe."""
    parts = [
        "Top-1 accuracy in percent at the multiply-accumulates of TDM's keep rates (to within 1 %),"
        " and 100·(1 − cosine) between the features of the reduced and the unreduced model, of"
        f" which less is better. ▼: significantly behind {OURS}, ▲: ahead of it (95 % paired"
        " bootstrap over the same images, seeds and draws averaged)."
    ]
    for recipe in RECIPES.values():
        chosen = [column for column in columns if column.recipe == recipe]
        if not chosen:
            continue
        header = ["method", *(f"{column.bed}, {column.rate:g}" for column in chosen)]
        rows = [
            [name, *(_cell(column, name) for column in chosen)]
            for name in dict.fromkeys(method.name for method in METHODS)
            if any(name in column.values for column in chosen)
        ]
        parts.append(f"**{recipe[0].upper()}{recipe[1:]}**\n\n{markdown(header, rows)}")
    return "\n\n".join(parts) + "\n"


def _cell(column: Column, method: str) -> str:
    if method not in column.values:
        return "–"
    lead = column.leads.get(method)
    sign = "" if lead is None or not lead.significant else " ▼" if lead.low > 0 else " ▲"
    return f"{column.values[method]:.2f}{sign}"


def _accuracies(bed: str, recipe: str, results: Sequence[Result]) -> list[Column]:
    when = "before" if recipe == RECIPES["free"] else "after"
    columns = []
    for rate in [rate for rate in RATES if rate in tables.rates_of(results)]:
        column = Column(bed, recipe, rate)
        for method in tables.methods_of(results):
            own = 1.0 if method == "Plain" else rate
            value = tables.mean_accuracy(results, method, own, when)
            if value == value:
                column.values[method] = 100 * value
            if method not in (OURS, "Plain"):
                lead = tables.difference(results, OURS, method, [rate], when)
                if lead is not None:
                    column.leads[method] = lead
        columns.append(column)
    return columns


def _distortions(path: Path) -> list[Column]:
    found = read_fidelity(path)
    columns = []
    for kind, title in (("pooled", "pooled features"), ("dense", "dense features")):
        for rate in [rate for rate in RATES if any(one.rate == rate for one in found)]:
            values = {
                method: {
                    one.draw: np.array(getattr(one, kind))
                    for one in found
                    if (one.method, one.rate) == (method, rate)
                }
                for method in dict.fromkeys(one.method for one in found)
            }
            column = Column(f"DINOv2-S {title}", RECIPES["free"], rate)
            for method, draws in values.items():
                if draws:
                    column.values[method] = 100 * float(np.mean([d.mean() for d in draws.values()]))
                    column.leads.update(_lead(values.get(OURS, {}), method, draws))
            columns.append(column)
    return columns


def _lead(
    ours: Mapping[int, np.ndarray], method: str, draws: Mapping[int, np.ndarray]
) -> dict[str, Difference]:
    """How much less WardTDM distorts; the crops of the draws both have are images of one set."""
    common = sorted(ours.keys() & draws.keys())
    if method == OURS or not common:
        return {}
    theirs, mine = (np.concatenate([side[draw] for draw in common]) for side in (draws, ours))
    return {method: paired_difference([theirs], [mine])}
