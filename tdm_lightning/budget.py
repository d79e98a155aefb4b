"""The keep rate that meets a compute budget."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdm_lightning.flops import count_macs, macs_with
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.vit import TokenReducedViT


def solve_keep_rate(
    model: nn.Module,
    strategy: Strategy,
    gmacs: float,
    input_size: tuple[int, int, int] | None = None,
    resolution: float = 1e-3,
) -> float:
    """The largest keep rate at which a model stays within a budget.

    Args:
        model: a timm ViT, or a reduced one (its strategy is ignored).
        strategy: the method, with any keep rate; it is not changed.
        gmacs: the budget in 10⁹ multiply-accumulates per image, counted as :func:`tdm_lightning.flops.count_macs` does.
        input_size: channels, height and width; the model's own by default.
        resolution: the answer is a multiple of this.

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
    config = strategy.config()
    if "keep_rate" not in config["init_args"]:
        raise TypeError(f"{type(strategy).__name__} has no keep rate to solve for")
    if not gmacs > 0:  # also refuses NaN
        raise ValueError(f"gmacs must be a positive number of 10⁹ multiply-accumulates, got {gmacs!r}")
    budget = gmacs * 1e9
    if count_macs(vit, input_size) <= budget:
        return 1.0
    steps = round(1 / resolution)

    def cost(step: int) -> int:
        arguments: dict[str, Any] = {**config["init_args"], "keep_rate": step / steps}
        return macs_with(vit, type(strategy).from_config({**config, "init_args": arguments}), input_size)

    def fits(step: int) -> bool:
        try:
            return cost(step) <= budget
        except ValueError:  # a rate so low that its schedule leaves no token costs too little, not too much
            return True

    low, high = 1, steps  # low fits, high does not
    if not fits(low):
        raise ValueError(
            f"{type(strategy).__name__} cannot meet {gmacs} GMACs: even keep rate {1 / steps} costs {cost(low) / 1e9:.3f}; "
            f"reduce in earlier layers or take a smaller model"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    try:
        cost(low)
    except ValueError as error:
        raise ValueError(f"{type(strategy).__name__} cannot meet {gmacs} GMACs: {error}") from None
    return low / steps
