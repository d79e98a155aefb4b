"""The setting of a method that meets a compute budget."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.flops import macs_with
from tdm_lightning.schedules import SearchSpace
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.adapters import model_info


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
        gmacs: the budget in 10⁹ multiply-accumulates per image, counted as
            :func:`tdm_lightning.flops.count_macs` does.
        input_size: channels, height and width; the model's own by default.
        resolution: the answer is a multiple of this.
        total: the budget also covers the strategy's parameter-free work, which
            :func:`~tdm_lightning.flops.count_macs` leaves out.

    Returns:
        The keep rate.

    Raises:
        TypeError: if the strategy has no keep rate.
        ValueError: if the budget is not positive, or even the smallest keep rate costs more.

    >>> import timm, tdm_lightning as tdm
    >>> solve_keep_rate(timm.create_model("deit_small_patch16_224"), tdm.TDM(), gmacs=3.0)
    0.701
    """
    if "keep_rate" not in strategy.config()["init_args"]:
        raise SettingTypeError(f"{type(strategy).__name__} has no keep rate to solve for")
    size = round(1 / resolution)
    space = SearchSpace(size, lambda step: strategy.changed(keep_rate=step / size))
    return cast(Any, _largest(model, space, gmacs, input_size, total)).keep_rate


def at_budget(
    model: nn.Module,
    strategy: Strategy,
    gmacs: float,
    input_size: tuple[int, int, int] | None = None,
    total: bool = False,
) -> Strategy:
    """A strategy like this one, its largest of its :meth:`~tdm_lightning.Strategy.search_space`
    within a budget.

    Args:
        model: as :func:`solve_keep_rate`, as are the other arguments and errors.
        strategy: the method; it is not changed.
        gmacs: the budget in 10⁹ multiply-accumulates per image.
        input_size: channels, height and width; the model's own by default.
        total: the budget also covers the strategy's parameter-free work.

    Raises:
        TypeError: if the strategy has no setting that decides what it costs.

    >>> import timm, tdm_lightning as tdm
    >>> vit = timm.create_model("test_vit", img_size=96)
    >>> at_budget(vit, tdm.ToMe(), gmacs=0.01).r
    [3, 2, 2, 2, 2, 2]
    """
    vit: Any = _timm_model(model)
    info = model_info(vit)
    space = strategy.search_space(info.depth, info.patches)
    if space is None:
        raise SettingTypeError(
            f"{type(strategy).__name__} has no keep rate or other setting that alone decides what"
            " it costs, so none can be solved for; take one that has (SPViT: with"
            " fixed_count=True)"
        )
    return _largest(vit, space, gmacs, input_size, total)


def _largest(
    model: nn.Module,
    space: SearchSpace[Strategy],
    gmacs: float,
    input_size: tuple[int, int, int] | None,
    total: bool,
) -> Strategy:
    """The last setting within the budget."""
    if not gmacs > 0:  # also refuses NaN
        raise SettingError(
            f"gmacs must be a positive number of 10⁹ multiply-accumulates, got {gmacs!r}"
        )
    vit, budget = _timm_model(model), gmacs * 1e9

    def cost(step: int) -> int:
        return macs_with(vit, space.candidate(step), input_size, total)

    def fits(step: int) -> bool:
        try:
            return cost(step) <= budget
        except (
            ValueError
        ):  # a rate so low that its schedule leaves no token costs too little, not too much
            return True

    if (
        cost(space.size) <= budget
    ):  # also refuses settings that do not fit the model whatever the rate
        return space.candidate(space.size)
    name = type(space.candidate(space.size)).__name__
    if not fits(1):
        raise SettingError(
            f"{name} cannot meet {gmacs} GMACs: its cheapest setting costs {cost(1) / 1e9:.3f};"
            " reduce in earlier layers or take a smaller model"
        )
    low, high = 1, space.size  # fits, and does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    try:
        cost(low)
    except ValueError as error:
        raise SettingError(
            f"{name} cannot meet {gmacs} GMACs; its cheapest setting costs {cost(high) / 1e9:.3f}:"
            f" {error}"
        ) from None
    return space.candidate(low)


def _timm_model(model: nn.Module) -> nn.Module:
    return model.vit if isinstance(model, TokenReducedViT) else model
