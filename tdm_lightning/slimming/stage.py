"""One step of the search: a block whose mask is wanted, and the block behind it."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core import Tokens
from tdm_lightning.slimming.error import relative_error
from tdm_lightning.slimming.impact import attention_maps, impact_scores, influence_through
from tdm_lightning.vit.adapters import adapter_for
from tdm_lightning.vit.adapters.parts import ATTENTIONS, BLOCKS, parts_of


class Stage:
    """Block ``index`` of a ViT whose earlier blocks compute all tokens and whose later ones are
    masked already.

    Args:
        vit: the plain model.
        index: the block; not the last one.
        later: patches that the block behind it computes, N, bool.
        images: batches to look at, each B×C×H×W. Two states of all of their tokens are held in
            memory.
    """

    def __init__(self, vit: Any, index: int, later: Tensor, images: list[Tensor]) -> None:
        self.index = index
        self.adapter = adapter_for(vit)
        self.info = self.adapter.info(vit)
        self.prefix = self.info.prefix
        self.block, self.behind = self.adapter.blocks(vit)[index : index + 2]
        self.later = later
        #: The tokens that enter and leave the block, one pair of B×T×C for each batch.
        self.around = [_around(vit, index, batch) for batch in images]

    def influence(self, leaving: list[Tensor]) -> list[Tensor]:
        """How far the tokens behind the block reach the final ones, B×R×T, given that of those
        behind the next block.
        """
        alive = self._alive(self.later)
        return [
            influence_through(before, alive, self._attention(self.behind, x))
            for before, (_, x) in zip(leaving, self.around, strict=True)
        ]

    def scores(self, influence: list[Tensor]) -> Tensor:
        """The impact of each patch, N, mean over the images."""
        total = torch.zeros(self.prefix + len(self.later), device=self.later.device)
        for reach, (x, _) in zip(influence, self.around, strict=True):
            total += impact_scores(reach, self._attention(self.block, x), x).sum(dim=0)
        return total[self.prefix :] / sum(len(x) for x, _ in self.around)

    def error(self, kept: Tensor, block: nn.Module | None = None) -> float:
        """Relative error of what the next block computes if this one computes ``kept`` only,
        against :attr:`wanted`.

        Args:
            kept: patches that this block computes, N, bool; all of :attr:`later` are among them.
            block: a tuned copy to measure in its place.
        """
        found = (self._behind(entering, leaving, kept, block) for entering, leaving in self.around)
        return relative_error(found, self.wanted)

    def tuned(self, kept: Tensor, epochs: int, lr: float) -> nn.Module:
        """A copy of the block, trained to lower the error at ``kept`` (AdamW, squared relative
        error).
        """
        block = copy.deepcopy(self.block).requires_grad_(True)
        optimizer = torch.optim.AdamW(block.parameters(), lr, weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(epochs):
                for (entering, leaving), wanted in zip(self.around, self.wanted, strict=True):
                    off = self._behind(entering, leaving, kept, block) - wanted
                    loss = off.float().square().sum() / wanted.float().square().sum()
                    gradients = torch.autograd.grad(loss, list(block.parameters()))
                    for parameter, gradient in zip(block.parameters(), gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
        return block

    @cached_property
    def wanted(self) -> list[Tensor]:
        """What the next block computes while this one computes all, B×Q×C for each batch."""
        every = torch.ones_like(self.later)
        return [self._behind(entering, leaving, every) for entering, leaving in self.around]

    def _behind(
        self, entering: Tensor, leaving: Tensor, kept: Tensor, block: nn.Module | None = None
    ) -> Tensor:
        """The rows that the next block computes of ``kept`` rows of this one."""
        rows = self._alive(kept).nonzero().flatten()
        x = leaving.index_select(1, rows) if block is None else self._rows(block, entering, rows)
        return self._rows(self.behind, x, self._alive(self.later)[rows].nonzero().flatten())

    def _rows(self, block: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        others = torch.ones_like(x[0, :, 0], dtype=torch.bool).index_fill(0, rows, False)
        order = torch.cat((rows, others.nonzero().flatten()))  # a block takes the first rows
        tokens = Tokens(x.index_select(1, order), self.prefix, self.info)
        attended, _ = self.adapter.attend(block, self.index, tokens, frozenset(), len(rows))
        return self.adapter.feed_forward(block, attended)

    def _attention(self, block: Any, x: Tensor) -> Tensor:
        tokens = Tokens(x, self.prefix, self.info)
        plain: Any = parts_of(block, BLOCKS)  # for rows can be chosen
        (attn,), (norm, _) = plain.attentions(block), plain.norms(block)
        heads = parts_of(attn, ATTENTIONS).heads(attn, norm(x), tokens, self.index)
        return attention_maps(heads.q, heads.k, heads.scale)

    def _alive(self, patches: Tensor) -> Tensor:
        """A mask of patches with the prefix tokens, which always stay, in front."""
        return nn.functional.pad(patches, (self.prefix, 0), value=True)


def _around(vit: Any, index: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that enter and leave a block of the plain model."""
    adapter = adapter_for(vit)
    x = adapter.embed(vit, images, adapter.info(vit)).x
    *before, last = list(adapter.blocks(vit))[: index + 1]
    for block in before:
        x = block(x)
    return x, last(x)
