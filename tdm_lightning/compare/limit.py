"""What no method can pass: as few tokens, for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdm_lightning.compare.methods import Method
from tdm_lightning.core.checks import check_counts
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies import Strategy, TokenReduction
from tdm_lightning.vit import TokenReducedViT


class FreeSlicing(Strategy):
    """Keeps the first patches, whichever they are: the cost of a method's token counts without the
    method. Its logits mean nothing.

    Args:
        counts: patch tokens that each block leaves, from the first; they must not grow.

    Raises:
        TypeError, ValueError: if they are no such integers.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = check_counts(counts, "counts")

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check that there is one count per block.

        Raises:
            ValueError: if there is not.
        """
        if len(self.counts) != info.depth:
            raise SettingError(
                f"counts must hold one number per block, {info.depth} here, got {len(self.counts)}"
            )

    def spares_class_tokens(self) -> bool:
        """See :class:`~tdm_lightning.Strategy`: only patches go; a limit leaves out all it can."""
        return self.keeps_hooks_of(FreeSlicing)

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """A view of the tokens that stay; what follows positions and patches is told of it."""
        keep, count = self.counts[index], tokens.count
        if keep >= count:
            return tokens
        if tokens.positions is None and tokens.history is None:
            size = None if tokens.size is None else tokens.size[:, :keep]
            return tokens.replace(x=tokens.x[:, : tokens.prefix + keep], size=size)
        place = torch.arange(count, device=tokens.x.device).expand(len(tokens.x), -1)
        stays = place < keep
        reduction = Reduction(
            tokens.patches[:, :keep],
            torch.where(stays, place, -1),
            torch.where(stays, int(Role.KEPT), int(Role.DROPPED)),
            position=place[:, :keep],
        )
        return tokens.reduced(index, reduction)


def model_method(methods: Sequence[Method]) -> Method:
    """The first of some methods whose token counts a limit can have: of a fixed budget, reducing
    inside its blocks.

    Raises:
        ValueError: if there is none.
    """
    for method in methods:
        if isinstance(method.model, TokenReducedViT):
            strategy = method.model.strategy
            if isinstance(strategy, TokenReduction) and not strategy.before:
                return method
    raise SettingError(
        "limit=true slices to the token counts of the first method of a fixed budget that reduces"
        " inside its blocks, and there is none; add one, such as TDM, WardTDM or EViT, or leave"
        " limit out"
    )


@torch.no_grad()
def token_counts(model: TokenReducedViT, images: Tensor) -> list[int]:
    """Patch tokens after each block."""
    return model.trace(images[:1])[1].token_counts
