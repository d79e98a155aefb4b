"""A loss that is no number any more ends the run, and says where it was."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tdm_lightning.core.configurable import arguments_line
from tdm_lightning.errors import TrainingError
from tdm_lightning.strategies import Strategy


def check_loss(
    terms: Mapping[str, Tensor], strategy: Strategy, rates: list[float], place: str
) -> None:
    """Refuse a loss that is infinite or NaN, before it reaches the weights.

    Looking at it waits for the device, once a step.

    Args:
        terms: the loss's terms by name, each a scalar.
        strategy: what the model was reduced by.
        rates: the optimizer's learning rates.
        place: where training stands.

    Raises:
        ValueError: if one of the terms is not finite; names all terms, the learning rate and what
            the strategy did.
    """
    if all(bool(value.isfinite()) for value in terms.values()):
        return
    values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
    keep = strategy.current_keep_rate
    now = "" if keep is None else f" at a keep rate of {keep:g}"
    method = f"{type(strategy).__name__}({arguments_line(strategy.config())})"
    raise TrainingError(
        f"the loss is not finite in {place}: {values}; learning rate {max(rates, default=0):g},"
        f" {method}{now}. The weights are as the step before left them: go on from the last"
        " checkpoint with a lower lr, a longer warm-up, clipped gradients (gradient_clip_val) or"
        " a precision of more bits"
    )
