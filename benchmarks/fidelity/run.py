"""Every method at every budget on every draw, one line of the table each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from benchmarks.fidelity.measure import Fidelity, distances, observed
from benchmarks.study.plan import METHODS, Cell, Method, chosen_methods
from benchmarks.study.run import NoSetting, at_its_budget
from tdm_lightning.strategies import Strategy
from tdm_lightning.vit import attach

#: TDM's keep rates whose budgets all methods get.
RATES = (0.7, 0.5, 0.3, 0.2)
#: Seeds of the crops: what draws differ by shows what a standard error over crops does not.
DRAWS = (1, 2, 3)


def training_free(names: Sequence[str] | None = None) -> list[Method]:
    """The methods of these names; ``None``: all that need neither training nor labels.

    Raises:
        ValueError: for a method that is not among them.
    """
    known = [m for m in METHODS if m.free and m.look is None and m.name != "Plain"]
    return chosen_methods(known, names)


def measured(
    vit: nn.Module,
    make: Callable[[], nn.Module],
    crops_of: Callable[[int], Tensor],
    methods: Sequence[Method],
    rates: Sequence[float],
    draws: Sequence[int],
    done: set[tuple[str, float, int]],
    report: Callable[[str], None] = print,
) -> Iterator[Fidelity]:
    """What is not done yet, draw by draw.

    Args:
        vit: the pretrained timm model, ready for evaluation.
        make: makes a model like it, to count costs.
        crops_of: the images of a draw, B×3×H×W.
        methods: those to measure.
        rates: TDM's keep rates.
        draws: seeds.
        done: methods, rates and draws that are there.
        report: called with a line for a method that has no setting at a budget.
    """
    settings: dict[tuple[str, float], tuple[Strategy, float] | None] = {}
    for draw in draws:
        todo = [(m, rate) for rate in rates for m in methods if (m.name, rate, draw) not in done]
        if not todo:
            continue
        images = crops_of(draw)
        plain = observed(vit, Strategy(), images)
        for method, rate in todo:
            key = (method.name, rate)
            if key not in settings:
                cell = Cell(method, rate, seed=1)
                settings[key] = _setting(cell, vit, make, images, report)
            if (found := settings[key]) is not None:
                strategy = Strategy.from_config(found[0].config())
                values = distances(plain, observed(vit, strategy, images))
                yield Fidelity(method.name, rate, found[1], draw, *values)


def _setting(
    cell: Cell,
    vit: nn.Module,
    make: Callable[[], nn.Module],
    images: Tensor,
    report: Callable[[str], None],
) -> tuple[Strategy, float] | None:
    """The strategy at the budget, and what it costs."""
    try:
        strategy, costs = at_its_budget(
            cell, lambda _: make(), lambda chosen: attach(vit, chosen).eval(), lambda: images
        )
    except NoSetting as error:
        report(f"{cell.method.name} has no setting at keep rate {cell.rate:g}: {error}")
        return None
    return strategy, costs["gmacs"]
