"""Networks learn which tokens can go: what DynamicViT and SPViT have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_count, check_layers, check_layers_exist, check_number
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.output import Output
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers import Merger
from tdm_lightning.mergers.base import check_merger, check_reduction
from tdm_lightning.strategies.base import Requirements, Strategy
from tdm_lightning.strategies.distillation import distillation
from tdm_lightning.strategies.groups import paced_groups
from tdm_lightning.strategies.objective import Criterion, TrainingObjective

#: Logits of keeping and of dropping each token, B×N×2, from tokens B×N×C and their policy B×N.
Votes = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LearnedState:
    """What a pass under a learned selection notes.

    Attributes:
        initial: number of patches at first.
        decisions: how far each token was kept, stage by stage, B×N each; ``None``: not in training
            mode.
        holder: the token that holds each patch, -1 where it was dropped, B×N0; ``None`` where
            nothing was merged.
    """

    initial: int
    decisions: tuple[Tensor, ...] | None = None
    holder: Tensor | None = None


class LearnedSelection(Strategy, TrainingObjective):
    """Before some blocks a network scores every token; the best stay, the others are given up.

    In training mode all tokens stay: Gumbel-softmax decisions mask them out of everyone else's
    attention, and a loss holds the share that is kept to a schedule. With a merger training merges
    as inference does: the importance is a Gumbel-softmax sample of the keep probabilities, so the
    choice varies; gradients reach networks and backbone through the weights of the combined tokens
    and through a policy on them that is 1 but passes gradients to the decisions.
    """

    def __init__(
        self,
        layers: Sequence[int],
        merger: Merger | None,
        ratio_weight: float,
        distill_weight: float,
        token_weight: float,
        backbone_lr_scale: float | None,
        freeze_epochs: int,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers)
        self.merger = check_merger(merger, {"importance"})
        self.ratio_weight = check_number(ratio_weight, "ratio_weight")
        self.distill_weight = check_number(distill_weight, "distill_weight")
        self.token_weight = check_number(token_weight, "token_weight")
        self.backbone_lr_scale = (
            None
            if backbone_lr_scale is None
            else check_number(backbone_lr_scale, "backbone_lr_scale")
        )
        self.freeze_epochs = check_count(freeze_epochs, "freeze_epochs", least=0)
        self.score_predictor = nn.ModuleList()

    @abstractmethod
    def shares(self) -> Sequence[float]:
        """Share of the initial patches that each stage is to leave, with the current keep rate."""

    @abstractmethod
    def keep_count(self, stage: int, initial: int) -> int:
        """Patches left after ``stage`` (from 1) of ``initial``."""

    def requires(self) -> Requirements:
        """Sizes for the merger, a teacher for the distillation."""
        merger = self.merger
        return Requirements(
            sizes=merger is not None and (merger.reads_sizes or merger.proportional_attention),
            teacher=self.distill_weight > 0 or self.token_weight > 0,
        )

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check layers and merger against the model.

        Raises:
            ValueError: if a layer is out of range, or the merger cannot make so many tokens.
        """
        check_layers_exist(self.layers, info.depth)
        count = info.patches
        for stage in range(1, len(self.layers) + 1) if self.merger is not None else ():
            keep = self.keep_count(stage, info.patches)
            if keep < count:
                self.merger.check(count, keep)  # type: ignore[union-attr]
            count = keep

    def begin(self, tokens: Tokens) -> Tokens:
        """Note how many patches there are; in training, let each token be attended to.

        Every token starts with a policy of 1, so the ε of masked attention acts from the first
        block on.
        """
        if not self.training:
            return tokens.replace(state=LearnedState(tokens.count))
        policy = torch.ones(tokens.x.shape[:2], device=tokens.x.device)
        return tokens.replace(state=LearnedState(tokens.count, ()), policy=policy)

    def merged(
        self, index: int, tokens: Tokens, importance: Tensor, score: Tensor, keep: int
    ) -> Tokens:
        """The tokens after the merger.

        Args:
            index: the block.
            tokens: those that enter.
            importance: for the merger, B×N, non-negative.
            score: for the trace, B×N.
            keep: how many leave.
        """
        return self._after(index, tokens, self._merge(index, tokens, importance, keep), score)

    def merged_by_samples(self, index: int, tokens: Tokens, votes: Votes, keep: int) -> Tokens:
        """The tokens of a training pass after the merger had samples of the keep probabilities as
        importance; arguments as :meth:`merged`.
        """
        assert tokens.policy is not None
        state: LearnedState = tokens.state
        assert state.decisions is not None
        prefix, policy = tokens.policy.split((tokens.prefix, tokens.count), dim=1)
        probability = F.gumbel_softmax(votes(tokens.patches, policy), tau=1.0, hard=False)[..., 0]
        reduction = self._merge(index, tokens, probability, keep)
        # A straight-through 1 for every token, averaged inside each group: the forward pass attends
        # to all alike, the backward pass tells the network whether attending to a token helped, as
        # the mask does where nothing is merged.
        through = policy * (1 + probability - probability.detach())
        members = reduction.totals(torch.ones_like(through))
        policy = reduction.totals(through) / members
        tokens = tokens.replace(
            policy=torch.cat((prefix, policy), dim=1),
            state=replace(
                state,
                decisions=(*state.decisions, probability),
                holder=_followed(reduction.assignment, state.holder),
            ),
        )
        return self._after(index, tokens, reduction, probability)

    def _merge(self, index: int, tokens: Tokens, importance: Tensor, keep: int) -> Reduction:
        assert self.merger is not None
        seen = Seen(tokens.patches, tokens.size, importance, prefix=tokens.prefix)
        reduction = self.merger(seen, keep)
        check_reduction(reduction, seen, keep, self.merger, index)
        return reduction

    def _after(self, index: int, tokens: Tokens, reduction: Reduction, score: Tensor) -> Tokens:
        assert self.merger is not None
        tokens = tokens.reduced(index, reduction, score)
        return tokens.with_size_bias() if self.merger.proportional_attention else tokens

    # Training

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """Task loss, ``ratio`` of kept tokens, and ``distillation`` and ``tokens`` against the
        teacher, each with its weight.

        Raises:
            ValueError: if the pass was not made in training mode, or the teacher is missing or of
                another shape.
        """
        terms = super().loss(output, target, criterion, teacher)
        name, state = type(self).__name__, output.state
        if not isinstance(state, LearnedState) or state.decisions is None:
            raise SettingError(
                f"{name}'s predictors only learn in training mode: call model.train() before the"
                " forward pass"
            )
        decisions = state.decisions
        if decisions:
            wanted = self.shares()[: len(decisions)]
            error = ratio_error(decisions, wanted, state.initial, self._per_image())
            terms["ratio"] = self.ratio_weight * error
        if self.requires().teacher:
            kept = decisions[-1].detach() if decisions else None
            logits, tokens = distillation(
                output, teacher, state.initial, kept, state.holder, name, self._token_loss()
            )
            terms |= {
                "distillation": self.distill_weight * logits,
                "tokens": self.token_weight * tokens,
            }
        return terms

    def _per_image(self) -> bool:
        """Whether every image is held to the schedule, and not the mean over the batch."""
        return False

    def _token_loss(self) -> Literal["mse", "kl"]:
        """Distance to the teacher's tokens, see :func:`distillation`."""
        return "mse"

    def _paced(
        self, model: Any, weight_decay: float, slow: dict[str, Any], fast: dict[str, Any]
    ) -> list[dict[str, Any]] | None:
        """Groups for a slow backbone and fast networks; ``None`` where all train alike."""
        if self.backbone_lr_scale is None:
            return None
        slow = {**slow, "freeze_epochs": self.freeze_epochs}
        return paced_groups(model, weight_decay, slow, fast)


def ratio_error(
    decisions: Sequence[Tensor], wanted: Sequence[float], initial: int, per_image: bool
) -> Tensor:
    """Squared distance of the kept shares from a schedule, the mean over its stages.

    Args:
        decisions: how far each token was kept at each stage, B×N each.
        wanted: the schedule.
        initial: number of patches that the shares are of.
        per_image: hold every image to it, not the mean over the batch.
    """
    share = torch.stack([decision.sum(1) for decision in decisions], dim=1) / initial
    share = share if per_image else share.mean(dim=0, keepdim=True)
    return (share - share.new_tensor(wanted)).square().mean()


def _followed(assignment: Tensor, holder: Tensor | None) -> Tensor:
    """Which token holds each patch, B×N0, after tokens B×N went where ``assignment`` says."""
    if holder is None:
        return assignment
    here = torch.where(holder < 0, assignment.shape[1], holder)  # what is gone stays so
    return F.pad(assignment, (0, 1), value=-1).gather(1, here)
