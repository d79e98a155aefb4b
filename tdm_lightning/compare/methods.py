"""The models to compare: a plain timm ViT, and the same under each strategy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdm_lightning.budget import at_budget
from tdm_lightning.checkpoints import load_weights
from tdm_lightning.core.configurable import Configurable, arguments_line
from tdm_lightning.errors import SettingError, SettingTypeError, TokenReductionError
from tdm_lightning.mergers import TokenMerger
from tdm_lightning.sparsity import SViTE
from tdm_lightning.sparsity.extract import as_extracted
from tdm_lightning.strategies import (
    DPCKNN,
    IARED2,
    TDM,
    AViT,
    DyViT,
    EViT,
    EvoViT,
    PSViT,
    SPViT,
    Stack,
    Strategy,
    ToMe,
    TopK,
)
from tdm_lightning.vit import attach, detach
from tdm_lightning.vit.attach import reduced_vit
from tdm_lightning.vit.create import create_vit
from tdm_lightning.vit.in_place import as_function

#: Blocks of the models that the methods were published for.
DEPTH = 12

#: Arguments that make a method what it is in a table: shown even where they have their defaults.
_KNOBS = ("keep_rate", "r", "masks")

#: Of these a method may take one or the other.
_EITHER = ("keep_rate", "r")


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: what the method is called.
        settings: its arguments.
        model: the model in evaluation mode.
        trained: whether all of its weights came from the checkpoint, so that its accuracy means
            something.
        remark: why not, if there was a checkpoint.
        extracted: whether masked heads and MLP units were taken out of the model, as one would run
            it after training.
    """

    name: str
    settings: str
    model: nn.Module
    trained: bool = False
    remark: str = ""
    extracted: bool = False

    @property
    def runs(self) -> nn.Module:
        """The model as its users run it, on images alone."""
        return as_function(self.model)


def posters_strategies(
    adjustable: bool = False, static: bool = False, depth: int = DEPTH
) -> list[Strategy]:
    """The methods of the paper's poster, and the diversity-only ones beside them, as published;
    SPViT with fixed counts.

    Args:
        adjustable: only those with a setting to solve for a budget.
        static: only those that keep the same number of tokens for every image.
        depth: number of the model's blocks. Where it has not all of the published ones, the methods
            take those as far into it: 1, 3 and 4 of six for 3, 6 and 9 of twelve.
    """
    found = [
        TDM(),
        EViT(),
        EViT(merger=TokenMerger()),
        DyViT(),
        DyViT(merger=TokenMerger()),
        EvoViT(),
        ToMe(),
        DPCKNN(),
        TopK(),
        PSViT(),
        SPViT(fixed_count=True),
        SViTE(),
        AViT(),
        IARED2(),
    ]
    found = [_for_depth(strategy, depth) for strategy in found]
    if static:
        found = [strategy for strategy in found if not strategy.adaptive]
    return [
        strategy
        for strategy in found
        if not adjustable or strategy.search_space(depth=1, patches=2)
    ]


def _for_depth(strategy: Strategy, depth: int) -> Strategy:
    """The same method where all of its layers exist."""
    layers = strategy.config()["init_args"].get("layers")
    if not layers or max(layers) < depth:
        return strategy
    return strategy.changed(layers=sorted({layer * depth // DEPTH for layer in layers}))


def make_plain(name: str, arguments: Mapping[str, Any], weights: bool | str | None) -> Method:
    """The unreduced model.

    Raises:
        ValueError: if timm does not know the model, or the weights do not fit.
        TypeError: if its tokens cannot be reduced.
    """
    vit = create_vit(name, weights is True, **arguments)
    detach(attach(vit, Strategy()))  # refuses what cannot be reduced, before anything is measured
    if isinstance(weights, str):
        load_weights(vit, weights)
    return Method("plain", "", vit.eval(), trained=bool(weights))


def make_method(
    strategy: Strategy,
    name: str,
    arguments: Mapping[str, Any],
    weights: bool | str | None = None,
    match_gmacs: float | None = None,
) -> Method:
    """The model under a strategy, pooling as the strategy needs it.

    Args:
        strategy: a method that is not attached yet.
        name: of a timm model.
        arguments: for ``timm.create_model``.
        weights: a file, folder or hub name, or ``True`` for timm's pretrained ones. If they are
            not all of the method's, the model keeps its random ones and says so.
        match_gmacs: budget to solve the method's setting for.

    Raises:
        ValueError: if the strategy does not fit the model, or cannot meet the budget.
        TypeError: if the strategy has no setting to solve for.
    """
    title, settings = describe(strategy)
    if strategy.requires().pooling == "patches":
        arguments = {"global_pool": "avg", **arguments}
    try:
        vit = create_vit(name, weights is True, **arguments)
        if match_gmacs is not None:
            strategy = at_budget(vit, strategy, match_gmacs)
            title, settings = describe(strategy)
        model = reduced_vit(vit, strategy).eval()
    except TokenReductionError as error:  # what else a user's own strategy raises is a bug in it
        kind = SettingTypeError if isinstance(error, TypeError) else SettingError
        raise kind(f"{title}({settings}) does not fit {name}: {error}") from error
    trained, remark = _load(model, weights) if isinstance(weights, str) else (bool(weights), "")
    return Method(title, settings, model, trained, remark, extracted=as_extracted(model))


def _load(model: nn.Module, weights: str) -> tuple[bool, str]:
    """Load a file; whether it held all weights, and if not, what was wrong."""
    try:
        untouched = load_weights(model, weights).untouched
    except TokenReductionError as error:
        return False, " ".join(str(error).split())
    if untouched:
        others = f" and {len(untouched) - 1} others" if len(untouched) > 1 else ""
        return False, f"{weights} has no weights for {untouched[0]}{others}"
    return True, ""


def describe(strategy: Strategy) -> tuple[str, str]:
    """A strategy's name in a table, with the merger that it stacks, and the settings that tell it
    from others.

    >>> describe(EViT(0.5, merger=TokenMerger()))
    ('EViT+TokenMerger', 'keep_rate=0.5')
    >>> describe(Stack([SViTE(), TDM()]))
    ('SViTE+TDM', 'masks=Structured(heads=0.7, units=0.7), keep_rate=0.7')
    """
    if isinstance(strategy, Stack):
        names, settings = (
            zip(*map(describe, strategy.members), strict=True)
            if len(strategy.members)
            else ((), ())
        )
        return "+".join(names) or "plain", ", ".join(filter(None, settings))
    config, usual = strategy.config()["init_args"], _defaults(type(strategy))
    shown = {
        name: value
        for name, value in config.items()
        if (name in _KNOBS or name not in usual or value != usual[name])
        and not (name in _EITHER and value is None)
    }
    title = type(strategy).__name__
    if shown.get("merger") is not None and usual.get("merger") is None:
        title += "+" + shown["merger"]["class_path"].rsplit(".", 1)[-1]
        merger: Any = strategy.merger
        if shown["merger"]["init_args"] == _defaults(type(merger)):
            del shown["merger"]
    return title, arguments_line(
        {"init_args": {name: _short(value) for name, value in shown.items()}}
    )


def _defaults(kind: type[Configurable]) -> dict[str, Any]:
    """The arguments of a strategy or merger that was given none; empty where some must be."""
    parameters = list(inspect.signature(kind).parameters.values())
    if any(parameter.default is parameter.empty for parameter in parameters):
        return {}
    return kind().config()["init_args"]


class _Brief:
    """Shown as it is, where a value's own form would be quoted or long."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _short(value: Any) -> Any:
    """Runs in long lists of numbers are counted: ``[11×9, 10×3]``."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 4:
        return value
    runs: list[list[Any]] = []
    for item in value:
        if runs and runs[-1][0] == item:
            runs[-1][1] += 1
        else:
            runs.append([item, 1])
    return _Brief(
        f"[{', '.join(f'{item}×{times}' if times > 1 else str(item) for item, times in runs)}]"
    )
