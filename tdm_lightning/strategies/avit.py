"""A-ViT: every token halts when it has computed enough."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from tdm_lightning.core.checks import check_number
from tdm_lightning.core.output import Output
from tdm_lightning.core.tokens import Padding, Tokens
from tdm_lightning.core.trace import History
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.objective import Criterion, TrainingObjective

#: Share of the prior that lies on the blocks before its mean.
_BEFORE_MEAN = 0.98

#: A share of the halting scores counts as at least this and at most one less this.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class HaltingState:
    """What a pass sums up, for every token of the full batch, B×T and B×T×C.

    Attributes:
        spent: weight that each token has given out.
        sums: its weighted sum of states; ``None`` at the end of the pass, when they are the tokens.
        running: which of the present tokens run on; ``None`` before the first block.
        left: weight that each of the present tokens has left.
        blocks: blocks that each token ran through; in training, as what follows.
        ponder: those, plus the weight left at halting.
        scores: halting scores after each block.
    """

    spent: Tensor
    sums: Tensor | None
    running: Tensor | None = None
    left: Tensor | None = None
    blocks: Tensor | None = None
    ponder: Tensor | None = None
    scores: tuple[Tensor, ...] = ()


class AViT(Strategy, TrainingObjective):
    """Lets each token halt after a block of its own (Yin et al., CVPR 2022; ``NVlabs/A-ViT``). Adds
    no parameter.

    After each block a token scores ``h = sigmoid(gate_scale·x_0 - gate_center)`` by channel 0 of
    its state x, the class token too. It halts when its scores sum up to ``1 - eps``, at the last
    block in any case, and takes no part from then on. What the head reads is no state of the last
    block but each token's sum over the blocks it ran through, weighted by h and, where it halts, by
    what is left of 1.

    In training mode nothing is removed: halted tokens are zeroed and masked out of the attention,
    as in the official code, and the loss asks for early halting. At inference halted tokens leave
    the sequence, images with fewer tokens are padded to the longest, and an image leaves the batch
    when all tokens that the head reads have halted, its other tokens with it. The logits are those
    of masking.

    Readings: where the head pools over patches, it pools the sums, and an image stays until all its
    tokens have halted; distilled models wait for class and distillation token. Where the official
    code differs: it leaves the first image of a batch out of the mean scores by slicing the wrong
    axis, and counts in them what blocks make of the zeros in a halted token's place (0 here); a
    token whose scores sum to exactly ``1 - eps`` loses the rest of its weight there.

    The published weights only fit the gate they were trained with, which stands in their file's
    name, see :meth:`from_file_name`: (10, 30) for DeiT-T, (10, 75) for DeiT-S. For other models
    look at channel 0 first: where few states reach ``gate_center/gate_scale`` training starts from
    the whole model; where most do, tokens halt at once and hardly learn.

    Args:
        gate_scale: α, the slope of the score over channel 0; above 0.
        gate_center: β, the score's offset: without a weight for it, h is one half at ``x_0 =
            β/α``.
        eps: how far below 1 the sum of scores may stay; in (0, 1).
        ponder_weight: weight of the ponder loss, the mean over tokens of blocks run plus the weight
            left at halting.
        prior_weight: weight of the divergence of the blocks' mean scores from a Gaussian over the
            blocks.
        prior_mean: the block, counted from 0, where that Gaussian peaks; above 0.
        prior_std: its width in blocks.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    adaptive = True

    def __init__(
        self,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        eps: float = 0.01,
        ponder_weight: float = 5e-4,
        prior_weight: float = 1e-3,
        prior_mean: float = 8.0,
        prior_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.gate_scale = check_number(gate_scale, "gate_scale", above=True)
        self.gate_center = check_number(gate_center, "gate_center", least=-math.inf)
        self.eps = check_number(eps, "eps", above=True)
        if self.eps >= 1:
            raise SettingError(f"eps must lie in (0, 1), got {eps!r}; the official value is 0.01")
        self.ponder_weight = check_number(ponder_weight, "ponder_weight")
        self.prior_weight = check_number(prior_weight, "prior_weight")
        self.prior_mean = check_number(prior_mean, "prior_mean", above=True)
        self.prior_std = check_number(prior_std, "prior_std", above=True)

    @classmethod
    def from_file_name(cls, path: str | os.PathLike[str], **settings: Any) -> AViT:
        """The strategy for a published file of weights, whose name ends in scale and center;
        nothing is read.

        Args:
            path: the file, or just its name.
            settings: other arguments.

        Raises:
            ValueError: if the name does not end so.

        >>> AViT.from_file_name("small-10-75.pth").gate_center
        75.0
        """
        number = r"(\d+(?:\.\d+)?)"
        found = re.search(rf"-{number}-{number}(?:\.[a-z]+)?$", PurePath(path).name)
        if found is None:
            raise SettingError(
                f"the name {PurePath(path).name!r} does not end in gate scale and center as A-ViT's"
                " small-10-75.pth does; pass AViT(gate_scale=…, gate_center=…) with the values it"
                " was trained with"
            )
        return cls(float(found[1]), float(found[2]), **settings)

    def begin(self, tokens: Tokens) -> Tokens:
        """Every token starts with an empty sum."""
        sums = torch.zeros_like(tokens.x, dtype=_wide(tokens.x))
        none = sums[..., 0]
        count = none if self.training else None
        # A token never stands for another, so sizes need not be followed.
        state = HaltingState(none, sums, blocks=count, ponder=count)
        return tokens.replace(size=None, state=state)

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Take out what halted in the block before."""
        state: HaltingState = tokens.state
        running, left = state.running, state.left
        if running is None or torch.equal(running, _present(tokens)):
            return tokens
        if self.training:
            return tokens.replace(x=_zeroed(tokens.x, running)).masked(running)
        assert left is not None
        stay = running.any(dim=1)
        tokens = tokens.replace(state=replace(state, running=None))
        if not bool(stay.all()):
            tokens, running, left = tokens.staying(stay), running[stay], left[stay]
        tokens = tokens.replace(padding=Padding(running, tokens.images))
        return tokens.packed(index, running[:, tokens.prefix :], left[:, tokens.prefix :])

    def after_block(self, index: int, tokens: Tokens) -> Tokens:
        """Add this block's states to the sums, and see which tokens run on."""
        state, present = tokens.state, tokens.valid
        rows = _rows(tokens, state.spent.shape[1])
        x = tokens.x if present is None else _zeroed(tokens.x, present)
        score = torch.sigmoid(self.gate_scale * x[..., 0].to(_wide(x)) - self.gate_center)
        spent = _taken(state.spent, rows, score)
        left = 1 - spent
        if present is not None:  # one image alone has no padding
            score, left = score * present, left * present
        last = index == tokens.info.depth - 1
        running = torch.zeros_like(spent, dtype=torch.bool)
        if not last:
            running = spent + score < 1 - self.eps
        if present is not None:
            running = running & present
        if not self.training:
            running = running & running[:, : tokens.info.readout].any(dim=1, keepdim=True)
        weight = torch.where(running, score, left)
        state = replace(
            state,
            running=running,
            left=left - weight,
            spent=_added(state.spent, rows, weight),
            sums=_added(state.sums, rows, weight.unsqueeze(-1) * x),
        )
        if self.training:
            state = replace(
                state,
                blocks=state.blocks + _present(tokens),
                ponder=state.ponder + _present(tokens) + left * ~running,
                scores=(*state.scores, score),
            )
        return tokens.replace(x=x, state=state)

    def finish(self, tokens: Tokens) -> Tokens:
        """All tokens of all images are back, each as the sum of its states."""
        history = tokens.history
        if history is not None:
            source = history.source
            source = torch.arange(source.shape[1], device=source.device).expand_as(source)
            history = History(source, history.layers)
        positions = tokens.positions
        return tokens.replace(
            x=tokens.state.sums.to(tokens.x.dtype),
            history=history,
            positions=None if positions is None else replace(positions, index=None),
            key_bias=None,
            padding=None,
            state=replace(tokens.state, sums=None, running=None, left=None),
        )

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """Task loss, ``ponder`` and ``prior``, each with its weight; of a pass at inference the
        task loss alone.
        """
        terms = super().loss(output, target, criterion, teacher)
        state: HaltingState = output.state
        if state.ponder is None:
            return terms
        prior = prior_divergence(torch.stack(state.scores), self.prior_mean, self.prior_std)
        terms["ponder"] = self.ponder_weight * state.ponder.mean()
        terms["prior"] = self.prior_weight * prior
        return terms

    def report(self, output: Output, target: Tensor) -> dict[str, Tensor]:
        """``blocks``: how many a token ran through, on average."""
        blocks = output.state.blocks
        return {} if blocks is None else {"blocks": blocks.mean()}


def prior_divergence(scores: Tensor, mean: float, std: float) -> Tensor:
    """How far the blocks' mean halting scores are from their prior; a number, 0 where it would be
    negative.

    ``Σ t·log(t/p) / depth`` over the blocks, where p are the means over images and tokens as
    shares of their sum, within 0.01…0.99, and t the :func:`prior_target`.

    Args:
        scores: of all tokens after each block, depth×B×T.
        mean: see :func:`prior_target`.
        std: likewise.
    """
    score = scores.mean(dim=(1, 2))
    share = score / score.sum().clamp(
        min=1e-30
    )  # far below the gate's center all scores may underflow
    target = prior_target(len(share), mean, std).to(share)
    divergence = (
        torch.xlogy(target, target) - target * share.clamp(_LEAST_SHARE, 1 - _LEAST_SHARE).log()
    )
    return divergence.mean().clamp(min=0)


def prior_target(depth: int, mean: float, std: float) -> Tensor:
    """The prior over the blocks: a Gaussian density at 0…depth-1, scaled so that the blocks
    before its mean get 0.98 in all.

    Not normalised, as the official code has it: all 12 blocks of the official prior get 3.26.

    Args:
        depth: number of blocks.
        mean: where it peaks, above 0.
        std: its width.

    Returns:
        Float32, ``depth`` numbers.

    >>> prior_target(12, 8, 1)[5:].mul(1000).round().int().tolist()
    [14, 176, 789, 1301, 789, 176, 14]
    """
    block = torch.arange(depth, dtype=torch.float64)
    log_density = -0.5 * ((block - mean) / std) ** 2
    return (_BEFORE_MEAN * (log_density - log_density[block < mean].logsumexp(dim=0)).exp()).float()


def _wide(x: Tensor) -> torch.dtype:
    """Sums over the blocks need more than half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def _present(tokens: Tokens) -> Tensor:
    """Which rows are tokens that run, B×T, bool."""
    return (
        torch.ones_like(tokens.x[..., 0], dtype=torch.bool)
        if tokens.valid is None
        else tokens.valid
    )


def _zeroed(x: Tensor, running: Tensor) -> Tensor:
    return x.masked_fill(~running.unsqueeze(-1), 0)


def _rows(tokens: Tokens, length: int) -> Tensor | None:
    """Where the present tokens stood in the batch at first, all its sequences of ``length`` in a
    row; B·T. ``None``: they all still do.
    """
    if tokens.positions is None or tokens.positions.index is None:
        return None
    batch, device = tokens.x.shape[0], tokens.x.device
    prefix = torch.arange(tokens.prefix, device=device).expand(batch, -1)
    images = torch.arange(batch, device=device) if tokens.images is None else tokens.images
    rows = torch.cat((prefix, tokens.positions.index + tokens.prefix), dim=1)
    return (rows + length * images.unsqueeze(1)).flatten()


def _taken(full: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """The present tokens' values, in the shape of ``like``, B×T."""
    return full if rows is None else full.flatten().index_select(0, rows).view_as(like)


def _added(full: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    """The full batch's values plus those of the present tokens, B×T or B×T×C; padding adds zeros,
    wherever it stands.
    """
    if rows is None:
        return full + values
    return full.flatten(0, 1).index_add(0, rows, values.flatten(0, 1)).view_as(full)
