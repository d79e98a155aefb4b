"""The setting of a method that meets a compute budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tdm_lightning.flops import macs_with
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.families import patch_count


def solve_keep_rate(
    model: nn.Module,
    strategy: Strategy,
    gmacs: float,
    input_size: tuple[int, int, int] | None = None,
    resolution: float = 1e-3,
    total: bool = False,
) -> float:
    """The largest keep rate at which a model stays within a budget.

    Args:
        model: a timm ViT, or a reduced one (its strategy is ignored).
        strategy: the method, with any keep rate; it is not changed.
        gmacs: the budget in 10⁹ multiply-accumulates per image, counted as :func:`tdm_lightning.flops.count_macs` does.
        input_size: channels, height and width; the model's own by default.
        resolution: the answer is a multiple of this.
        total: the budget also covers the strategy's parameter-free work, which :func:`~tdm_lightning.flops.count_macs` leaves
            out.

    Returns:
        The keep rate.

    Raises:
        TypeError: if the strategy has no keep rate.
        ValueError: if the budget is not positive, or even the smallest keep rate costs more.

    >>> import timm, tdm_lightning as tdm
    >>> solve_keep_rate(timm.create_model("deit_small_patch16_224"), tdm.TDM(), gmacs=3.0)
    0.701
    """
    vit = model.vit if isinstance(model, TokenReducedViT) else model
    if "keep_rate" not in strategy.config()["init_args"]:
        raise TypeError(f"{type(strategy).__name__} has no keep rate to solve for")
    budget = _check_budget(gmacs)
    steps = round(1 / resolution)

    def cost(step: int) -> int:
        return macs_with(vit, _changed(strategy, keep_rate=step / steps), input_size, total)

    if cost(steps) <= budget:  # also refuses settings that do not fit the model whatever the rate
        return 1.0

    def fits(step: int) -> bool:
        try:
            return cost(step) <= budget
        except ValueError:  # a rate so low that its schedule leaves no token costs too little, not too much
            return True

    if not fits(1):
        raise ValueError(
            f"{type(strategy).__name__} cannot meet {gmacs} GMACs: even keep rate {1 / steps} costs {cost(1) / 1e9:.3f}; "
            f"reduce in earlier layers or take a smaller model"
        )
    step = _last(fits, 1, steps)
    try:
        cost(step)
    except ValueError as error:
        raise ValueError(f"{type(strategy).__name__} cannot meet {gmacs} GMACs: {error}") from None
    return step / steps


def at_budget(
    model: nn.Module,
    strategy: Strategy,
    gmacs: float,
    input_size: tuple[int, int, int] | None = None,
    total: bool = False,
) -> Strategy:
    """A strategy like this one, its one knob turned as far as a budget allows.

    The knob is the keep rate (:func:`solve_keep_rate`), or ToMe's r: as few merges as the budget allows, spread over the
    blocks as evenly as whole numbers can be, the early blocks first.

    Args:
        model: as :func:`solve_keep_rate`, as are the other arguments and errors.
        strategy: the method; it is not changed.
        gmacs: the budget in 10⁹ multiply-accumulates per image.
        input_size: channels, height and width; the model's own by default.
        total: the budget also covers the strategy's parameter-free work.

    >>> import timm, tdm_lightning as tdm
    >>> vit = timm.create_model("test_vit", img_size=96)
    >>> at_budget(vit, tdm.ToMe(), gmacs=0.01).r
    [3, 2, 2, 2, 2, 2]
    """
    if "r" not in strategy.config()["init_args"]:
        return _changed(strategy, keep_rate=solve_keep_rate(model, strategy, gmacs, input_size, total=total))
    vit: Any = model.vit if isinstance(model, TokenReducedViT) else model
    budget, depth = _check_budget(gmacs), len(vit.blocks)
    most = depth * (patch_count(vit) // 2)

    def with_merges(merges: int) -> Strategy:
        r = [merges // depth + (block < merges % depth) for block in range(depth)]
        return _changed(strategy, r=r if merges % depth else r[0])

    def exceeds(merges: int) -> bool:
        return macs_with(vit, with_merges(merges), input_size, total) > budget

    if exceeds(most):
        raise ValueError(
            f"{type(strategy).__name__} cannot meet {gmacs} GMACs, even if every block merges half of the tokens; take a "
            f"smaller model"
        )
    return with_merges(_last(exceeds, 0, most) + 1 if exceeds(0) else 0)


def _check_budget(gmacs: float) -> float:
    """In multiply-accumulates."""
    if not gmacs > 0:  # also refuses NaN
        raise ValueError(f"gmacs must be a positive number of 10⁹ multiply-accumulates, got {gmacs!r}")
    return gmacs * 1e9


def _changed(strategy: Strategy, **arguments: Any) -> Strategy:
    """A new strategy, made with some other arguments."""
    config = strategy.config()
    return type(strategy).from_config({**config, "init_args": {**config["init_args"], **arguments}})


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from ``low``, where something holds, that it holds for; at ``high`` it does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
