"""What differs between foreign ViT classes: one adapter for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, UnsupportedModelError
from tdm_lightning.strategies.base import Ahead, Requirements

Size = tuple[int, int]

#: Reads importance and keys from what an attention has computed; see :meth:`Adapter.attend`.
Read = Callable[[], Seen]


class Adapter(ABC):
    """Everything that a foreign ViT class does in its own way, taken apart.

    An adapter calls the model's own modules. It holds no state: one object serves all models of a
    class. Register it with :func:`~tdm_lightning.register_adapter`; nothing else has to be changed
    for a new class of models.

    Attributes:
        takes_rows: whether :meth:`attend` heeds ``rows``; then the last block of a pass that only
            gives logits computes no more than the head reads.
        in_place: whether the model runs itself, and only its blocks are changed.
        collects: whether a model that runs itself keeps what its blocks return, and so wants all
            patches of every one.
    """

    takes_rows: bool = False
    in_place: bool = False
    collects: bool = False

    # The model

    @abstractmethod
    def info(self, vit: Any) -> ModelInfo:
        """The model in numbers, at the image size that it was made for.

        Raises:
            TypeError: if it is a variant that cannot be reduced, such as one with a way of pooling
                that is not known here.
        """

    @abstractmethod
    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """Channels, height and width that the model was made for."""

    @abstractmethod
    def grid(self, vit: Any, size: Size) -> Size:
        """Rows and columns of patches in an image of ``size`` pixels."""

    @abstractmethod
    def blocks(self, vit: Any) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""

    def norms(self, vit: Any) -> Sequence[nn.Module]:
        """Modules behind the last block, up to the tokens that the head gets: a hook at one of them
        wants to see all rows.
        """
        norm = getattr(vit, "norm", None)
        return [] if norm is None else [norm]

    def check(self, vit: Any, requirements: Requirements) -> None:  # noqa: B027 - may have none
        """Refuse a model that cannot be taken apart, or not as a strategy asks for.

        Raises:
            TypeError: if it cannot; the message says why.
        """

    def needs_sizes(self, vit: Any) -> bool:
        """Whether the head, or positions, ask how many patches each token stands for."""
        return self.info(vit).pooling == "patches"

    # A pass

    @abstractmethod
    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """The tokens in front of the first block.

        Args:
            vit: the model.
            images: B×C×H×W.
            info: :meth:`info` of the model; the tokens take it along, with their own number of
                patches.

        Raises:
            ValueError: for images that the model cannot take.
        """

    def entering(
        self, vit: Any, x: Tensor, info: ModelInfo, given: Mapping[str, Any] | None = None
    ) -> Tokens:
        """Embedded tokens, B×T×C, as they enter the first block.

        Args:
            vit: the model.
            x: the tokens.
            info: :meth:`info` of the model.
            given: by name, what a model that runs itself gives its blocks beside them.

        Raises:
            ValueError: if something is given that merged tokens cannot follow.
        """
        patches = x.shape[1] - info.prefix
        if patches != info.patches:
            info = replace(info, patches=patches)
        size = None
        if info.pooling == "patches":
            size = torch.ones(x.shape[0], patches, device=x.device)
        return Tokens(x, info.prefix, info, size)

    def check_arguments(self, vit: Any, arguments: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise ``ValueError`` for an argument, by its name, that a model which runs itself is
        called with and that merged tokens cannot follow.
        """

    def returned(self, x: Tensor) -> Any:
        """What a block of a model that runs itself returns, of tokens B×T×C."""
        return x

    def encode(self, vit: Any, images: Tensor) -> Tensor:
        """The last features, B×T×C, that a model which runs itself makes of B×C×H×W."""
        raise UnsupportedModelError(f"{type(vit).__name__} does not run by itself")

    @abstractmethod
    def attend(
        self,
        block: Any,
        index: int,
        tokens: Tokens,
        needs: frozenset[str],
        rows: int | None = None,
    ) -> tuple[Tensor, Read]:
        """The attention half of a block. Queries, keys and values are computed once.

        Args:
            block: one of :meth:`blocks`.
            index: its number, from 0.
            tokens: those that enter.
            needs: what the strategy wants to see, see :meth:`tdm_lightning.Strategy.needs`.
            rows: how many rows of ``tokens.x`` to compute, the first ones, which look at all of
                them; ``None``: all. Only where :attr:`takes_rows` says so.

        Returns:
            The tokens after the attention's residual, B×T×C, and a function that reads what is
            needed from the queries and keys. That reading is the strategy's work, not the model's,
            so it is called, and counted, apart.
        """

    def attend_ahead(self, block: Any, tokens: Tokens, reduce: Callable[[Tensor], Ahead]) -> Tokens:
        """The attention half of a block whose tokens are merged by its own attention map before its
        values are read: what a merged token receives is the sum of its members', what it pays
        their mean by share.

        Args:
            block: one of :meth:`blocks`.
            tokens: those that enter.
            reduce: see :meth:`tdm_lightning.Strategy.ahead`.

        Raises:
            TypeError: for blocks that cannot be taken apart so.
        """
        raise UnsupportedModelError(f"{type(block).__name__} computes its attention in one piece")

    @abstractmethod
    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """The MLP half of a block, its residual included, B×T×C."""

    @abstractmethod
    def norm(self, vit: Any, x: Tensor) -> Tensor:
        """The norm behind the last block, B×T×C."""

    @abstractmethod
    def head(
        self, vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """The model's head on reduced tokens: a token that stands for several patches counts as
        many times.

        Args:
            vit: the model.
            features: tokens after the final norm, B×T×C, prefix tokens first.
            size: patches that each patch token stands for, B×(T-prefix), 0 for padding; ``None``:
                one each.
            pre_logits: stop before the classifier.

        Returns:
            What the model's own head returns, usually B×classes.
        """


def check_shape(images: Tensor, expected: tuple[int, int, int]) -> None:
    """Raise ``ValueError`` for images of another shape than the one that a model takes."""
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise SettingError(
            f"images must have shape B×{'×'.join(map(str, expected))} for this model, got"
            f" {tuple(images.shape)}; resize them"
        )


def nothing() -> Seen:
    """What is read where nothing is needed."""
    return Seen(None)  # type: ignore[arg-type]
