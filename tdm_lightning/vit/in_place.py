"""Reduce a model that runs itself: its layers do the work of a reduced model's blocks, one after
the other, and everything around them stays as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.core.trace import History
from tdm_lightning.errors import ReductionError, UnsupportedModelError
from tdm_lightning.ops import unmerge
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.vit.adapters import adapter_for
from tdm_lightning.vit.wrapper import TokenReducedViT

#: What hangs on the model: the strategy, so that it moves along, …
_STRATEGY = "token_reduction"
#: … and, in a tuple so that it is no submodule, the reduced model that tools ask.
_REDUCED = "_token_reduced"
#: On each layer: that reduced model, and the layer's number.
_LAYER = "_token_reduced_layer"


class InPlaceViT(TokenReducedViT):
    """What hangs on a model that runs itself with reduced layers: tools ask it, layers run by it.

    Made by :func:`reduce_in_place`.
    """

    def __init__(self, vit: nn.Module, strategy: Strategy) -> None:
        super().__init__(vit, strategy)
        #: What the model is called with, in order.
        self._arguments = [*inspect.signature(vit.forward).parameters]
        #: For each layer the tokens that enter it, and what the layer before showed of them.
        self._passing: list[tuple[Tokens, Tensor] | None] = [None] * len(self.hook_points)

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for an argument of the model that merged tokens cannot follow."""
        arguments = dict(zip(self._arguments, args, strict=False))
        self._adapter.check_arguments(self.vit, {**arguments, **kwargs})

    def run_layer(
        self, index: int, x: Tensor, given: Mapping[str, Any], listened: bool, again: bool
    ) -> Any:
        """What a layer makes of its tokens, as its library's layers return it.

        Args:
            index: the layer.
            x: what it was given, B×T×C.
            given: by name, what else.
            listened: whether somebody sees its output, and wants all patches.
            again: whether it will be run once more, when its gradient is wanted.

        Raises:
            ValueError: if the first was given what merged tokens cannot follow, or tokens were
                changed on the way.
        """
        tokens = self._block(index, self._entering(index, x, given, again), _unwatched)
        tokens = tokens.replace(x=self.hook_points[index](tokens.x, tokens.valid))
        last = index == len(self.hook_points) - 1
        if last:
            tokens = self.strategy.finish(tokens)
        all_patches = last or listened or self._adapter.collects
        shown = self._in_their_places(tokens) if all_patches else tokens.x
        if not last:
            self._passing[index + 1] = tokens, shown
        return self._adapter.returned(shown)

    def _entering(self, index: int, x: Tensor, given: Mapping[str, Any], again: bool) -> Tokens:
        if index == 0:
            tokens = self._adapter.entering(self.vit, x, self._info, given)
            patches = tokens.count
            if self._follows_sizes and tokens.size is None:
                tokens = tokens.replace(size=torch.ones(x.shape[0], patches, device=x.device))
            source = torch.arange(patches, device=x.device).expand(x.shape[0], -1)
            return self.strategy.begin(tokens.replace(history=History(source)))
        found = self._passing[index]
        if found is None:
            raise ReductionError("layers run one after the other, from the first")
        tokens, shown = found
        if not again:
            self._passing[index] = None
        if x is shown:
            return tokens
        if x.shape != tokens.x.shape:
            raise ReductionError(
                "the tokens were changed between two layers, where all patches were shown to a"
                " hook; change them where nobody listens, or in front of the first layer"
            )
        return tokens.replace(x=x)

    def _in_their_places(self, tokens: Tokens) -> Tensor:
        """Every patch with the feature of the token that holds it, B×T×C."""
        assert tokens.history is not None
        dense = unmerge(self.strategy.all_patches(tokens), tokens.history.source)
        return torch.cat((tokens.x[:, : self.num_prefix_tokens], dense), dim=1)


class Encoder(nn.Module):
    """A model that runs itself as a function of images: its last features, B×T×C."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """Its own pass, reduced or not."""
        return adapter_for(self.vit).encode(self.vit, images)


def as_function(model: nn.Module) -> nn.Module:
    """A ViT, reduced or not, as a module that takes images, B×C×H×W, alone and gives a tensor."""
    vit: Any = model.vit if isinstance(model, TokenReducedViT) else model
    return Encoder(vit) if adapter_for(vit).in_place else model


def reduce_in_place(vit: nn.Module, strategy: Strategy) -> InPlaceViT:
    """Let a model's layers reduce its tokens. The last one gives every patch the feature of the
    token that holds it (zero where it was dropped), in its place, so that whatever follows finds
    as many tokens as ever; a layer that somebody has hooked shows its output likewise.

    Raises:
        TypeError: for a strategy that trains by a loss of its own, has parameters, or whose number
            of tokens depends on the image.
    """
    if strategy.adaptive or strategy.objective is not None or [*strategy.parameters()]:
        raise UnsupportedModelError(
            f"{type(strategy).__name__} has a loss or parameters of its own, or as many tokens as"
            f" each image needs, and {type(vit).__name__} runs by its library's code, which knows"
            " of none of it; take a strategy without, such as TDM or WardTDM, or timm's model of"
            " the same weights"
        )
    reduced = InPlaceViT(vit, strategy)
    vit.add_module(_STRATEGY, strategy)
    object.__setattr__(vit, _REDUCED, (reduced,))
    vit.register_forward_pre_hook(_check_call, with_kwargs=True)
    for index, layer in enumerate(adapter_for(vit).blocks(vit)):
        object.__setattr__(layer, _LAYER, (reduced, index))
        layer.__class__ = _reduced_class(type(layer))  # type: ignore[arg-type]
    return reduced


def restore(vit: nn.Module) -> None:
    """Undo :func:`reduce_in_place`."""
    for layer in adapter_for(vit).blocks(vit):
        layer.__class__ = type(layer).__mro__[2]
        object.__delattr__(layer, _LAYER)
    for number in [key for key, hook in vit._forward_pre_hooks.items() if hook is _check_call]:
        del vit._forward_pre_hooks[number], vit._forward_pre_hooks_with_kwargs[number]
    delattr(vit, _STRATEGY)
    object.__delattr__(vit, _REDUCED)


def reduced_in_place(module: nn.Module) -> InPlaceViT | None:
    """The reduced model of one that :func:`reduce_in_place` changed; ``None``: it did not."""
    found = module.__dict__.get(_REDUCED)
    return None if found is None else found[0]


def _check_call(vit: nn.Module, args: Any, kwargs: Any) -> None:
    vit.__dict__[_REDUCED][0].check_call(args, kwargs)


class _Reduced:
    """What a layer does in place of its own forward pass."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is nowhere to be found by its name, which is that of the layer's own.
        return _blank, (type(self).__mro__[2],), self.__dict__

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Any:
        model, index = self.__dict__[_LAYER]
        listened = bool(self._forward_hooks)  # type: ignore[attr-defined]
        given = {"attention_mask": attention_mask, **others}
        again = self.training and getattr(self, "gradient_checkpointing", False)  # type: ignore[attr-defined]
        return model.run_layer(index, hidden_states, given, listened, again)


@functools.cache
def _reduced_class(kind: Any) -> Any:
    # Its own dictionary has the method, for layers that are checkpointed wrap what they find there.
    own = {"forward": _Reduced.forward, "__module__": kind.__module__}
    return type(kind.__name__, (_Reduced, kind), own)


def _blank(kind: Any) -> Any:
    cls = _reduced_class(kind)
    return cls.__new__(cls)


def _unwatched(stage: str, index: int) -> None:
    pass
