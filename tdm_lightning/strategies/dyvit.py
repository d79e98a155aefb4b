"""DynamicViT: small networks learn which tokens can go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_choice, check_count, check_number
from tdm_lightning.core.tokens import Output, Tokens
from tdm_lightning.mergers.token_merger import TokenMerger, check_early_merger
from tdm_lightning.strategies.base import Criterion
from tdm_lightning.strategies.distillation import distillation
from tdm_lightning.strategies.groups import paced_groups
from tdm_lightning.strategies.predictor import KeepPredictor
from tdm_lightning.strategies.sampled import (
    merge_sampled,
    merged,
    ratio_error,
    sampled_decisions,
    start_sampling,
)
from tdm_lightning.strategies.staged import StagedStrategy, keep_best


class DyViT(StagedStrategy):
    """Predicts before some blocks which patch tokens to keep (Rao et al., NeurIPS 2021;
    ``raoyongming/DynamicViT``).

    At inference stage s keeps the ``int(keep_rate^s · N0)`` best-scored tokens, best first, and
    the rest is gone; DeiT-S at 0.7: 196 → 137 → 96 → 67. In training mode all tokens stay:
    Gumbel-softmax decisions mask them out of everyone else's attention, a dropped token never
    returns, and the share that is kept is held to the schedule by a loss. The predictors only learn
    in training mode.

    With a merger the tokens that would be dropped are clustered and the kept ones matched, down to
    the schedule's count, with the predictors' keep probability as importance. Training then merges
    as inference does (no published system says how; this is a reading): the keep probabilities are
    Gumbel-softmax samples, so the choice varies; gradients reach predictors and backbone through
    the weights of the combined tokens and through a policy on them that is 1 but passes gradients
    to the decisions.

    Args:
        keep_rate: share of the initial patch tokens that is left at the first stage, its square at
            the second, and so on; in (0, 1].
        layers: blocks *before* which tokens are dropped, counted from 0.
        merger: combines tokens instead of dropping them.
        ratio_weight: λ of the loss on the kept share; the official commands take 2 for DeiT-S and
            5 for DeiT-B.
        distill_weight: weight of the divergence from the teacher's logits; 0: none.
        token_weight: weight of the distance to the teacher's tokens; 0: none. Without both no
            teacher is needed.
        token_loss: that distance: ``"mse"``, or the ``"kl"`` divergence of the features (LV-ViT).
        ratio_per_image: hold every image to the schedule, not just the mean over the batch.
        backbone_lr_scale: the backbone's learning rate as a share of the predictors'. ``None``
            trains everything alike, as from scratch.
        freeze_epochs: epochs in which the backbone does not learn; only with a
            ``backbone_lr_scale``.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        merger: TokenMerger | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_weight: float = 0.5,
        token_loss: Literal["mse", "kl"] = "mse",
        ratio_per_image: bool = True,
        backbone_lr_scale: float | None = 0.01,
        freeze_epochs: int = 5,
    ) -> None:
        super().__init__(keep_rate, layers)
        self.merger = check_early_merger(merger)
        self.ratio_weight = check_number(ratio_weight, "ratio_weight")
        self.distill_weight = check_number(distill_weight, "distill_weight")
        self.token_weight = check_number(token_weight, "token_weight")
        self.token_loss = check_choice(token_loss, ("mse", "kl"), "token_loss")
        self.ratio_per_image = bool(ratio_per_image)
        self.backbone_lr_scale = (
            None
            if backbone_lr_scale is None
            else check_number(backbone_lr_scale, "backbone_lr_scale")
        )
        self.freeze_epochs = check_count(freeze_epochs, "freeze_epochs", least=0)
        self.needs_teacher = self.distill_weight > 0 or self.token_weight > 0
        self.score_predictor = nn.ModuleList()

    def bind(self, vit: Any, patches: int) -> None:
        """Check the schedule and make a predictor for each stage."""
        super().bind(vit, patches)
        present = patches
        for stage in range(1, len(self.layers) + 1) if self.merger is not None else ():
            keep = self.keep_count(stage, patches)
            if keep < present:
                self.merger.split(present, keep)  # type: ignore[union-attr]
            present = keep
        device = next(vit.parameters()).device
        self.score_predictor.extend(KeepPredictor(vit.embed_dim).to(device) for _ in self.layers)

    def tracks_size(self) -> bool:
        """Only for proportional attention."""
        return self.merger is not None and self.merger.proportional_attention

    def begin(self, tokens: Tokens) -> Tokens:
        """Note how many tokens there are at first; in training, let each be attended to."""
        tokens = super().begin(tokens)
        return start_sampling(tokens) if self.training else tokens

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Score, then drop, merge or (in training) mask."""
        if index not in self.layers:
            return tokens
        predictor, keep = (
            self.score_predictor[self.layers.index(index)],
            self.to_keep(index, tokens),
        )
        if self.training and self.merger is None:
            return self._mask(predictor, tokens)
        if keep == tokens.count:
            return tokens
        if self.merger is not None and self.training:
            return merge_sampled(index, tokens, self.merger, predictor, keep)
        score = predictor(tokens.patches)[..., 0]
        if self.merger is None:
            return tokens.reduced(index, keep_best(tokens.patches, score, keep), score)
        return merged(
            index, tokens, self.merger, self.merger(tokens.patches, score.exp(), keep), score
        )

    def _mask(self, predictor: nn.Module, tokens: Tokens) -> Tokens:
        assert tokens.policy is not None
        prefix, policy = tokens.policy.split((tokens.prefix, tokens.count), dim=1)
        sample = F.gumbel_softmax(predictor(tokens.patches, policy), tau=1.0, hard=True)
        decision = sample[..., 0] * policy
        tokens = tokens.carrying(decisions=(*tokens.carry["decisions"], decision))
        return tokens.replace(policy=torch.cat((prefix, decision), dim=1))

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
        name, initial = type(self).__name__, output.carry["initial"]
        decisions = sampled_decisions(output, name)
        if decisions:
            rate = self.annealed(self.keep_rate)
            wanted = [rate**stage for stage in range(1, len(decisions) + 1)]
            terms["ratio"] = self.ratio_weight * ratio_error(
                decisions, wanted, initial, self.ratio_per_image
            )
        if self.needs_teacher:
            kept = decisions[-1].detach() if decisions else None
            logits, tokens = distillation(output, teacher, initial, kept, name, self.token_loss)
            terms |= {
                "distillation": self.distill_weight * logits,
                "tokens": self.token_weight * tokens,
            }
        return terms

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Predictors at full rate; the backbone slower and frozen at first; class token and
        positions never trained.
        """
        if self.backbone_lr_scale is None:
            return None
        slow = {"lr": lr, "lr_scale": self.backbone_lr_scale, "freeze_epochs": self.freeze_epochs}
        return paced_groups(
            model, weight_decay, slow, {"lr": lr, "lr_scale": 1.0, "freeze_epochs": 0}
        )
