"""The reduced model that a command's settings describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tdm_lightning.checkpoints import load_weights, open_weights
from tdm_lightning.errors import FileError, SettingError
from tdm_lightning.strategies import TDM, Strategy
from tdm_lightning.strategies.stack import stacked
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.attach import reduced_vit
from tdm_lightning.vit.create import create_vit


@dataclass(frozen=True)
class Chosen:
    """A reduced model, ready for inference.

    Attributes:
        model: the model.
        config: what is known of it beyond itself, for
            :meth:`~tdm_lightning.TokenReducedViT.save_pretrained`.
    """

    model: TokenReducedViT
    config: dict[str, Any] = field(default_factory=dict)


def choose_model(
    weights: bool | str | None,
    model: str,
    model_kwargs: dict[str, Any] | None,
    strategy: Strategy | list[Strategy] | None,
) -> Chosen:
    """Make a model and load its weights.

    Args:
        weights: ``True`` for timm's pretrained ones, or what
            :func:`~tdm_lightning.checkpoints.open_weights` takes; otherwise they are random.
        model: the name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``.
        strategy: the token-reduction method; ``None``: TDM at 0.7, or none where the weights say
            that they were trained without.

    Raises:
        ValueError, TypeError: if something is missing or does not fit.
    """
    arguments = model_kwargs or {}
    vit = create_vit(model, weights is True, **arguments)
    if not isinstance(weights, str):
        return Chosen(reduced_vit(vit, strategy or TDM()).eval(), {"model_args": arguments})
    source = open_weights(weights)
    chosen = strategy or (TDM() if source.stored is None else Strategy())
    reduced = reduced_vit(vit, chosen).eval()
    if source.stored is not None and _differs(chosen, source.stored.strategy):
        source = source.without_strategy()
    report = load_weights(reduced, source)
    if own := [name for name in report.untouched if name.startswith("strategy.")]:
        raise FileError(
            f"{type(reduced.strategy).__name__} has layers of its own, and {weights} holds no"
            f" {own[0]}; give the strategy that it was trained with, or train this one first"
        )
    config = {"model_args": arguments} if source.stored is None else source.stored.config
    return Chosen(reduced, config)


def load_vit(weights: bool | str | None, name: str, arguments: dict[str, Any]) -> nn.Module:
    """The timm model with its weights; a strategy that they were trained under is left out."""
    vit = create_vit(name, weights is True, **arguments)
    if isinstance(weights, str):
        load_weights(vit, open_weights(weights).without_strategy())
    return vit


def check_trained(weights: bool | str | None, random_weights: bool, why: str) -> None:
    """Whether there are weights, or the user insists on random ones.

    Args:
        weights: as in :func:`choose_model`.
        random_weights: whether the user insists.
        why: why random ones are of no use.

    Raises:
        ValueError: if not.
    """
    if not weights and not random_weights:
        raise SettingError(
            f"{why}: give --weights FILE (or a folder, a hub name, or true for timm's pretrained"
            " weights), or insist with --random_weights true"
        )


def _differs(requested: Strategy | list[Strategy], stored: Any) -> bool:
    """Whether a strategy is of another class than the stored one, so that its layers are others."""
    there = [] if stored is None else [Strategy.from_config(stored)]
    mine, theirs = stacked(requested), stacked(there)

    def kinds(strategy: Strategy) -> list[type]:
        return [type(member) for member in getattr(strategy, "members", [strategy])]

    return kinds(mine) != kinds(theirs)
