"""Run cells: solve the setting, evaluate, fine-tune, evaluate again."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, Literal

import timm
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from benchmarks.study.evaluate import Evaluation, evaluate, gathered
from benchmarks.study.finetune import Recipe, finetune, taught
from benchmarks.study.plain import Plain
from benchmarks.study.plan import Cell
from benchmarks.study.store import Record, Store, pack_bits
from tdm_lightning.budget import at_budget
from tdm_lightning.compare.environment import choose_device, device_name
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import SettingError
from tdm_lightning.flops import mac_report, macs_with
from tdm_lightning.strategies import TDM, Strategy
from tdm_lightning.version import __version__
from tdm_lightning.vit import TokenReducedViT

Part = Literal["validation", "test"]
Images = tuple[Tensor, Tensor]

#: Largest difference between a method's multiply-accumulates and TDM's.
TOLERANCE = 0.01
#: The same of a method that decides image by image, in the mean of so many images.
_MEAN_TOLERANCE, _LOOKED_AT, _AROUND = 0.05, 16, 5


class NoSetting(ValueError):
    """A method cannot meet a budget."""


def run_cells(
    cells: Sequence[Cell],
    plain: Plain,
    data: ImageNetDataModule,
    folder: Path,
    recipe: Recipe,
    split: Part,
    eval_images: int | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Do the cells that are not finished and that no other process is at.

    Args:
        cells: in the order to do them.
        plain: the model that all start from.
        data: prepared for that model.
        folder: where the cells are kept, one file each.
        recipe: of the fine-tuning; with 0 images there is none.
        split: what is evaluated on. Whatever is *chosen* by the result must be chosen on
            ``"validation"``.
        eval_images: only the first so many; ``None``: all.
        report: called with a line about each cell.

    Raises:
        ValueError: if a cell in the folder was made with other settings.
    """
    settings = {
        "split": split,
        "eval_images": eval_images,
        **asdict(recipe),
        "batch_size": data.hparams.batch_size,
        "plain": plain.fingerprint,
    }
    store = Store(folder, settings)
    images: Images | None = None
    for number, cell in enumerate(cells, start=1):
        if store.has(cell.name):
            continue
        with store.claimed(cell.name) as mine:
            if not mine:
                continue
            if images is None:  # only once there is something to do: reading a set takes a while
                data.setup("fit")
                images = _images(data, split, eval_images)
            record = run_cell(cell, plain, data, recipe, images)
            store.save(cell.name, record)
            report(f"{number}/{len(cells)} {cell.name}: {_summary(record)}")


def run_cell(
    cell: Cell, plain: Plain, data: ImageNetDataModule, recipe: Recipe, images: Images
) -> Record:
    """All that is to know of one cell; where a method cannot meet the budget, no ``"setting"`` and
    the ``"reason"``.
    """
    record: Record = {
        "method": cell.method.name,
        "rate": cell.rate,
        "seed": cell.seed,
        "note": cell.method.note,
    }
    record |= {"images": len(images[1]), "environment": _environment()}
    start = perf_counter()
    seed_everything(cell.seed, verbose=False)
    try:
        strategy, costs = at_its_budget(
            cell,
            plain.vit,
            lambda chosen: plain.under(chosen).model.eval(),
            lambda: next(iter(_unaugmented(data)))[0],
        )
    except NoSetting as error:
        return {**record, "setting": None, "reason": str(error)}
    record |= {"setting": strategy.config(), **costs, "seconds_to_solve": _since(start)}
    seed_everything(cell.seed, verbose=False)
    if cell.method.look is not None:
        strategy = cell.method.look(strategy, plain.under(Strategy()).model.vit, _unaugmented(data))
        record |= _costs(plain.vit(strategy), strategy)
    module = plain.under(taught(strategy, recipe), **recipe.arguments(cell.method.lr_factor))
    model = module.model.to(choose_device("auto"))
    if not recipe.train_images:
        start = perf_counter()
        record |= _evaluated("before", evaluate(model, *images))
        record["seconds_to_evaluate"] = _since(start)
    else:
        seed_everything(
            cell.seed, verbose=False
        )  # again: whatever a method drew so far, all see the same images
        start = perf_counter()
        finetune(module, data, recipe)
        record["seconds_to_finetune"] = _since(start)
        record |= _evaluated("after", evaluate(model.to(choose_device("auto")), *images))
    return record


def at_its_budget(
    cell: Cell,
    vit: Callable[[Strategy], nn.Module],
    under: Callable[[Strategy], TokenReducedViT],
    images: Callable[[], Tensor],
) -> tuple[Strategy, dict[str, float]]:
    """:func:`nearest` of a method with settings to choose from, else :func:`solved`."""
    if cell.method.settings:
        return nearest(cell, vit, under, images())
    return solved(cell, vit)


def solved(cell: Cell, vit: Callable[[Strategy], nn.Module]) -> tuple[Strategy, dict[str, float]]:
    """A cell's strategy at TDM's budget, and what it costs, in 10⁹ multiply-accumulates per
    image.

    Costs are ``gmacs``, all that the method does, which is what the budget is about;
    ``gmacs_backbone``, as papers count; and ``gmacs_budget``.

    Args:
        cell: what to solve.
        vit: makes the timm model for a strategy.

    Raises:
        NoSetting: if the method has no setting within 1 % of the budget.
    """
    strategy = cell.method.make(cell.rate)
    model = vit(strategy)
    budget = macs_with(vit(Strategy()), TDM(cell.rate), total=True)
    try:
        if cell.method.solve:
            strategy = _near(budget, model, strategy)
        costs = _costs(model, strategy)
    except ValueError as error:
        raise NoSetting(str(error)) from error
    return _again(strategy), {**costs, "gmacs_budget": budget / 1e9}


def _costs(vit: nn.Module, strategy: Strategy) -> dict[str, float]:
    # Counting attaches the strategy, and one with parameters can be attached only once.
    names = {"gmacs": True, "gmacs_backbone": False}
    return {n: macs_with(vit, _again(strategy), total=t) / 1e9 for n, t in names.items()}


def nearest(
    cell: Cell,
    vit: Callable[[Strategy], nn.Module],
    under: Callable[[Strategy], TokenReducedViT],
    images: Tensor,
) -> tuple[Strategy, dict[str, float]]:
    """Of a method that decides image by image the setting whose mean cost is nearest to the budget;
    as :func:`solved`.

    Args:
        cell: of a method with settings.
        vit: makes the timm model for a strategy, to count TDM's budget.
        under: puts the trained model under a strategy, ready for evaluation.
        images: B×C×H×W; the first few are looked at.

    Raises:
        NoSetting: if it has none within 5 %.
    """
    few, settings = images[:_LOOKED_AT], cell.method.settings
    budget = macs_with(vit(Strategy()), TDM(cell.rate), total=True)
    reports: dict[int, tuple[float, float]] = {}

    def cost(place: int) -> float:
        if place not in reports:
            model = under(_again(settings[place]))
            found = [mac_report(model, images=image.unsqueeze(0)) for image in few]
            reports[place] = fmean(f.total for f in found), fmean(f.backbone for f in found)
        return reports[place][0]

    above = bisect_left(range(len(settings)), budget, key=cost)
    # Their order is by what they are expected to cost, so the nearest may stand a little beside.
    around = range(max(above - _AROUND, 0), min(above + _AROUND, len(settings)))
    best = min(around, key=lambda at: abs(cost(at) - budget))
    if abs(cost(best) / budget - 1) > _MEAN_TOLERANCE:
        raise NoSetting(
            f"its nearest setting to {budget / 1e9:.4f} GMACs costs {cost(best) / 1e9:.4f} in the"
            " mean"
        )
    costs = {"gmacs": cost(best), "gmacs_backbone": reports[best][1], "gmacs_budget": budget}
    return _again(settings[best]), {name: value / 1e9 for name, value in costs.items()}


def _near(budget: float, model: nn.Module, strategy: Strategy) -> Strategy:
    """The last setting below a budget; where that is too far from it, the last one a little
    above.
    """
    costs = []
    for limit in (budget, budget * (1 + TOLERANCE)):
        found = at_budget(model, _again(strategy), limit / 1e9, total=True)
        costs.append(macs_with(model, _again(found), total=True))
        if abs(costs[-1] / budget - 1) <= TOLERANCE:
            return found
    raise NoSetting(
        f"the nearest settings to {budget / 1e9:.4f} GMACs cost"
        f" {' and '.join(f'{cost / 1e9:.4f}' for cost in costs)}"
    )


def _again(strategy: Strategy) -> Strategy:
    return Strategy.from_config(strategy.config())


def _images(data: ImageNetDataModule, split: Part, limit: int | None) -> Images:
    data.setup({"validation": "validate"}.get(split, split))
    loader: Any = data.val_dataloader() if split == "validation" else data.test_dataloader()
    if not loader:
        raise SettingError(
            "there is no validation split to evaluate on: set data.val_split or data.val_holdout"
        )
    return gathered(loader, limit)


def _unaugmented(data: ImageNetDataModule) -> Any:
    """Training images, prepared as for evaluation."""
    data = type(data)(**{**data.hparams, "augment": False})
    data.setup("fit")
    return data.train_dataloader()


def _evaluated(when: str, found: Evaluation) -> dict[str, Any]:
    return {
        f"accuracy_{when}": found.accuracy,
        f"diversity_{when}": [round(score, 4) for score in found.diversity],
        "tokens": found.tokens,
        f"correct_{when}": pack_bits(found.correct.numpy()),
    }


def _environment() -> dict[str, str]:
    device = choose_device("auto")
    return {
        "device": f"{device.type}: {device_name(device)}",
        "threads": str(torch.get_num_threads()),
        "versions": (
            f"python {platform.python_version()}, torch {torch.__version__}, timm"
            f" {timm.__version__}, tdm-lightning {__version__}"
        ),
    }


def _since(start: float) -> float:
    return round(perf_counter() - start, 1)


def _summary(record: Record) -> str:
    if record["setting"] is None:
        return f"no setting: {record['reason']}"
    accuracy = " → ".join(
        f"{record[name]:.2%}" for name in ("accuracy_before", "accuracy_after") if name in record
    )
    seconds = sum(value for name, value in record.items() if name.startswith("seconds_"))
    return f"{record['gmacs']:.4f} GMACs, {accuracy}, {seconds:.0f} s"
