"""Put a strategy around a timm ViT, and take it off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from tdm_lightning.errors import SettingError, UnsupportedModelError
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.stack import stacked
from tdm_lightning.vit.adapters import adapter_for, find_adapter, supported_classes
from tdm_lightning.vit.find import find_vit, find_vits, replace_submodule
from tdm_lightning.vit.in_place import reduce_in_place, restore
from tdm_lightning.vit.refusals import why_refused
from tdm_lightning.vit.wrapper import TokenReducedViT

_ViT = VisionTransformer | Eva | Beit | VisionTransformerRelPos | NaFlexVit


@overload
def attach(
    model: _ViT, strategy: Strategy | Sequence[Strategy], path: None = None
) -> TokenReducedViT: ...
@overload
def attach(
    model: nn.Module, strategy: Strategy | Sequence[Strategy], path: str | None = None
) -> Any: ...
def attach(
    model: nn.Module, strategy: Strategy | Sequence[Strategy], path: str | None = None
) -> Any:
    """Wrap a ViT so that it reduces its tokens. The ViT and its parameters are shared, not
    copied or changed.

    A ViT inside a larger model, such as a detector's backbone or the tower of a CLIP model, is
    replaced in its place by the reduced one, which answers to the same methods.

    Args:
        model: any model of timm's ViT classes: ``VisionTransformer`` (DeiT, DINOv2, CLIP, hybrids,
            …), ``Eva`` (EVA-02, DINOv3, PE), ``Beit``, ``VisionTransformerRelPos``,
            ``NaFlexVit``; torchvision's and open_clip's ``VisionTransformer``; or a module that
            holds one, which is changed in place.
        strategy: a token-reduction method, or a list of one and of methods that act on the weights,
            ``[SViTE(), TDM()]``. One with parameters or masks of its own can be attached once.
        path: where the ViT hangs in a larger model, such as ``"visual.trunk"``; may be left out
            where there is only one.

    Returns:
        The reduced model; the given one is its ``vit``. Of a larger model: that model itself.

    Raises:
        TypeError: if the model cannot be reduced (the message says why), or an argument is of the
            wrong kind.
        ValueError: if the model is reduced already, the strategy's settings do not fit it, or a
            larger model holds no ViT at ``path``, or several (the message lists their paths).

    >>> import timm, torch, tdm_lightning as tdm
    >>> vit = timm.create_model("test_vit", img_size=96)
    >>> model = tdm.attach(vit, tdm.TDM(keep_rate=0.5, layers=(1, 3)))
    >>> model.trace(torch.zeros(1, 3, 96, 96))[1].token_counts
    [36, 18, 18, 9, 9, 9]
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"attach() takes a timm model, got {model!r}; make one with timm.create_model(name)"
        )
    vit = (
        find_vit(model, path) if path or find_vits(model) else model
    )  # a model without any is told why it is none
    reduced = _reduced(vit, stacked(strategy))
    if reduced.in_place:
        return model
    if vit is model:
        return reduced
    replace_submodule(model, vit, reduced)
    return model


def reduced_vit(vit: nn.Module, strategy: Strategy | Sequence[Strategy]) -> TokenReducedViT:
    """As :func:`attach` for a ViT itself, but what tools take also of one that is reduced in its
    place.
    """
    if find_adapter(vit) is None:
        attach(vit, strategy)  # is told why not
    return _reduced(vit, stacked(strategy))


def _reduced(vit: nn.Module, strategy: Strategy) -> TokenReducedViT:
    if isinstance(vit, TokenReducedViT):
        raise SettingError(
            f"this model is reduced already, by {type(vit.strategy).__name__}; attach to the timm"
            " model, `model.vit`, or take the strategy off with detach() first"
        )
    if find_adapter(vit) is None:
        raise UnsupportedModelError(
            f"cannot reduce the tokens of {type(vit).__name__}: {_reason(vit)}"
        )
    adapter, requirements = adapter_for(vit), strategy.requires()
    info = adapter.info(vit)
    if requirements.absolute_positions and info.relative_positions:
        raise UnsupportedModelError(
            f"{type(strategy).__name__} lets tokens run that stand nowhere on the grid, and the"
            f" blocks of {type(vit).__name__} ask where a token is (RoPE or relative position"
            " bias); take a model with absolute positions, or another strategy"
        )
    try:
        adapter.check(vit, requirements)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"cannot reduce the tokens of {type(vit).__name__} with"
            f" {type(strategy).__name__}: {error}"
        ) from None
    if next(strategy.parameters(), None) is not None:
        raise SettingError(
            f"this {type(strategy).__name__} is attached already and owns parameters; make a new"
            " one for another model"
        )
    strategy.bind(vit, info)
    return reduce_in_place(vit, strategy) if adapter.in_place else TokenReducedViT(vit, strategy)


def detach(model: nn.Module, path: str | None = None) -> nn.Module:
    """The timm model again, as it was; in a larger model it takes its place again.

    Args:
        model: what :func:`attach` returned, or any module that holds it.
        path: where the reduced ViT hangs in a larger model; may be left out where there is only
            one.

    Returns:
        The timm model. Of a larger model: that model itself.

    Raises:
        TypeError: if there is no reduced model.
        ValueError: if a larger model has no such path, or holds several reduced models (the message
            lists their paths).
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"detach() takes what attach() returned, got {model!r}")
    reduced = {
        name: vit
        for name, vit in find_vits(model, path).items()
        if isinstance(vit, TokenReducedViT)
    }
    where = type(model).__name__ + (f".{path}" if path else "")
    if not reduced:
        raise UnsupportedModelError(
            f"detach() takes what attach() returned, got a {where} in which nothing is attached"
        )
    if len(reduced) > 1:
        raise SettingError(
            f"found {len(reduced)} reduced models in {where}: {', '.join(map(repr, reduced))}; say"
            " which by its path"
        )
    (found,) = reduced.values()
    if found.in_place:
        restore(found.vit)
        return model
    if found is model:
        return found.vit
    replace_submodule(model, found, found.vit)
    return model


def _reason(vit: nn.Module) -> str:
    """Why a model of another class is refused."""
    known = ", ".join(kind.__name__ for kind in supported_classes())
    return why_refused(vit) or (
        f"it is none of the ViT classes that have an adapter: {known}; another class is added with"
        " register_adapter()"
    )
