"""What the study compares: methods, budgets and seeds, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tdm_lightning.errors import SettingError
from tdm_lightning.mergers import TokenMerger
from tdm_lightning.slimming import select
from tdm_lightning.strategies import (
    DPCKNN,
    MCTF,
    MPM,
    TDM,
    DiffRate,
    DyViT,
    EViT,
    EvoViT,
    MaMe,
    PiToMe,
    PSViT,
    Random,
    SPViT,
    Strategy,
    ToFu,
    ToMe,
    WardTDM,
)
from tdm_lightning.vit import attach

#: TDM's keep rates, whose budgets all methods get; those that matter most first.
RATES = (0.3, 0.5, 0.2, 0.7)
#: Where none are chosen.
SEEDS = (1,)


@dataclass(frozen=True)
class Method:
    """One line of the study's figures.

    Attributes:
        name: what it is called there.
        make: the strategy at TDM's keep rate; where its setting is solved for, any setting will do.
        solve: whether its setting is solved for the budget of TDM at that keep rate.
        lr_factor: of the fine-tuning's learning rate, where the strategy's own groups slow the
            backbone by as much.
        note: how its fine-tuning or evaluation differs from the others'.
        look: takes from training images what the method must know before anything else: from its
            strategy at the budget, the trained plain ViT and the images, prepared as for
            evaluation, it makes the strategy to evaluate.
        free: whether it means anything without training: not so where predictors start at random or
            the classifier reads what it was not trained to read.
        settings: of a method that decides image by image, from the least to the most costly: the
            one is taken whose mean cost on training images is nearest to the budget.
    """

    name: str
    make: Callable[[float], Strategy] = field(compare=False)
    solve: bool = True
    lr_factor: float = 1.0
    note: str = ""
    free: bool = True
    look: Callable[[Strategy, nn.Module, Iterable[Any]], Strategy] | None = field(
        default=None, compare=False
    )
    settings: Sequence[Strategy] = field(default=(), compare=False)


def _by_impact(strategy: Strategy, vit: nn.Module, images: Iterable[Any]) -> Strategy:
    """PS-ViT with as many patches in each block as ``strategy`` has, those of greatest impact."""
    counts: Any = attach(vit, strategy).strategy.token_counts
    return PSViT(masks=select(vit, images, counts).masks.int().tolist())


#: DyViT's recipe trains the backbone at a hundredth of its predictors' rate and freezes it for five
#: epochs; fine-tunes as short as these would end before it thaws, so the backbone gets the rate
#: that all methods get and the predictors ten times as much.
_DYVIT: dict[str, Any] = {"backbone_lr_scale": 0.1, "freeze_epochs": 0}
_DYVIT_NOTE = (
    "distils from the plain model; predictors learn at ten times the rate, the backbone is not"
    " frozen; random predictors before"
)
_SPVIT: dict[str, Any] = {"fixed_count": True, **_DYVIT}
_SPVIT_NOTE = (
    "targets are powers of one share, met by every image;"
    f" {_DYVIT_NOTE.replace('predictors', 'selectors')}"
)
_PSVIT_NOTE = (
    "masks by the patches' impact on 256 training images at one keep rate per block, without its"
    " search"
)
_EVOVIT_NOTE = (
    "averages the patches for a classifier that was trained on the class token, which only"
    " fine-tuning adapts"
)

_DIFFRATE_NOTE = (
    "the shares that its authors learned for DeiT-S at 2.9 GFLOPs, raised to the power that meets"
    " the budget"
)

_MEAN_NOTE = (
    "decides image by image; meets the budget in the mean of training images, as near as its"
    " settings come"
)


def _by_threshold() -> list[Strategy]:
    return [MaMe(threshold=step / 200) for step in range(-100, 200)]


def _by_blocks() -> list[Strategy]:
    """MPM has no other setting than its blocks: those between two, every one, second or third."""
    chosen = {
        tuple(range(first, last + 1, step))
        for first in range(12)
        for last in range(first, 12)
        for step in (1, 2, 3)
    }

    def predicted(blocks: tuple[int, ...]) -> float:
        """What is left where every merging takes a quarter, summed over the blocks."""
        return sum(0.75 ** sum(block <= at for block in blocks) for at in range(12))

    return [MPM(layers=blocks) for blocks in sorted(chosen, key=predicted)]


#: Six blocks, one keep rate for all, solved for the budget: as many small steps as three large ones
#: cost. Chosen on the validation split, see :mod:`~benchmarks.study.placement`.
_EVERY_OTHER = (0, 2, 4, 6, 8, 10)

METHODS = (
    Method("Plain", lambda rate: Strategy(), solve=False),
    Method("TDM", TDM, solve=False),
    Method(
        "TDM (4 blocks)",
        lambda rate: TDM(rate, layers=(0, 3, 6, 9)),
        note="reduces in WardTDM's blocks instead of the paper's three",
    ),
    Method(
        "TDM (6 blocks)",
        lambda rate: TDM(rate, layers=_EVERY_OTHER),
        note="reduces after every other block instead of three, by the same share each time",
    ),
    Method("WardTDM", lambda rate: WardTDM()),
    Method(
        "WardTDM (6 blocks)",
        lambda rate: WardTDM(layers=_EVERY_OTHER),
        note="reduces in every other block",
    ),
    Method(
        "WardTDM (12 blocks)",
        lambda rate: WardTDM(layers="all", rounds=2),
        note="reduces in every block, in two rounds",
    ),
    Method("EViT", lambda rate: EViT()),
    Method("DPC-KNN", lambda rate: DPCKNN()),
    Method("ToMe", lambda rate: ToMe()),
    Method("ToMe (rate)", lambda rate: ToMe(keep_rate=0.9), note="a constant rate in every block"),
    Method("PiToMe", lambda rate: PiToMe()),
    Method("MCTF", lambda rate: MCTF()),
    Method("DiffRate", lambda rate: DiffRate(), note=_DIFFRATE_NOTE),
    Method("ToFu", lambda rate: ToFu()),
    Method("MaMe", lambda rate: MaMe(), solve=False, note=_MEAN_NOTE, settings=_by_threshold()),
    Method("MPM", lambda rate: MPM(), solve=False, note=_MEAN_NOTE, settings=_by_blocks()),
    Method("Random", lambda rate: Random()),
    Method(
        "Random (12 blocks)",
        lambda rate: Random(layers=tuple(range(12))),
        note="a constant rate in every block",
    ),
    Method("DyViT", lambda rate: DyViT(**_DYVIT), lr_factor=10, note=_DYVIT_NOTE, free=False),
    Method(
        "DyViT+TDM",
        lambda rate: DyViT(merger=TokenMerger(), **_DYVIT),
        lr_factor=10,
        free=False,
        note=_DYVIT_NOTE,
    ),
    Method("Evo-ViT", lambda rate: EvoViT(), note=_EVOVIT_NOTE, free=False),
    Method("SPViT", lambda rate: SPViT(**_SPVIT), lr_factor=10, note=_SPVIT_NOTE, free=False),
    Method(
        "SPViT+TDM",
        lambda rate: SPViT(merger=TokenMerger(), **_SPVIT),
        lr_factor=10,
        free=False,
        note=_SPVIT_NOTE,
    ),
    Method("PS-ViT", lambda rate: PSViT(), note=_PSVIT_NOTE, look=_by_impact),
)


@dataclass(frozen=True)
class Cell:
    """One run: a method at the budget of TDM's keep rate, with a seed."""

    method: Method
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Unique and stable; the name of its file."""
        return f"{self.method.name}-{self.rate:g}-{self.seed}"


def grid_cells(
    methods: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    trained: bool = True,
) -> list[Cell]:
    """The grid in the order to run it; arguments as :func:`crossed`. The plain model comes once a
    seed. Without training (``trained``) only the methods that mean anything then.

    Raises:
        ValueError: if there is no such method.
    """
    known = [method for method in METHODS if trained or method.free]
    cells = crossed(known, RATES, methods, rates, seeds)
    once = (replace(c, rate=1.0) if c.method.name == "Plain" else c for c in cells)
    return list(dict.fromkeys(once))


def chosen_methods(known: Sequence[Method], names: Iterable[str] | None) -> list[Method]:
    """The methods of these names, in the order known; ``None``: all.

    Raises:
        ValueError: if there is none of a name.
    """
    wanted = None if names is None else set(names)
    unknown = sorted(wanted - {method.name for method in known}) if wanted is not None else []
    if unknown:
        raise SettingError(
            f"no method {', '.join(unknown)} in the study; there are"
            f" {', '.join(m.name for m in known)}"
        )
    return [method for method in known if wanted is None or method.name in wanted]


def crossed(
    known: Sequence[Method],
    every: Sequence[float],
    methods: Sequence[str] | None,
    rates: Sequence[float] | None,
    seeds: Sequence[int] | None,
) -> list[Cell]:
    """Every method at every keep rate with every seed.

    Args:
        known: the methods there are.
        every: the keep rates where none are chosen.
        methods: only these.
        rates: TDM's keep rates, others than usual may be asked for.
        seeds: of the fine-tuning; ``None``: :data:`SEEDS`.

    Raises:
        ValueError: if there is no such method.
    """
    chosen = chosen_methods(known, methods)
    return [
        Cell(method, rate, seed)
        for seed in seeds or SEEDS
        for rate in rates or every
        for method in chosen
    ]
