"""DynamicViT: small networks learn which tokens can go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_choice
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.mergers import Drop, Merger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.learned import LearnedSelection
from tdm_lightning.strategies.predictor import KeepPredictor


class DyViT(LearnedSelection):
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
        merger: Merger | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_weight: float = 0.5,
        token_loss: Literal["mse", "kl"] = "mse",
        ratio_per_image: bool = True,
        backbone_lr_scale: float | None = 0.01,
        freeze_epochs: int = 5,
    ) -> None:
        super().__init__(
            layers,
            merger,
            ratio_weight,
            distill_weight,
            token_weight,
            backbone_lr_scale,
            freeze_epochs,
        )
        self._schedule = RateAtBlocks(keep_rate, layers, "initial")
        self.keep_rate = self._schedule.keep_rate
        self.token_loss = check_choice(token_loss, ("mse", "kl"), "token_loss")
        self.ratio_per_image = bool(ratio_per_image)

    def shares(self) -> list[float]:
        """See :class:`LearnedSelection`."""
        rate = self.annealed(self.keep_rate)
        return [rate**stage for stage in range(1, len(self.layers) + 1)]

    def keep_count(self, stage: int, initial: int) -> int:
        """Tokens left after ``stage`` (from 1) of ``initial``; rounded down.

        Raises:
            ValueError: if none is left.
        """
        return self._schedule.left_after(stage, initial, self.current_keep_rate)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check the schedule and make a predictor for each stage."""
        super().bind(vit, info)
        self._schedule.check(info)
        self.score_predictor.extend(KeepPredictor(info.width).to(info.device) for _ in self.layers)

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Score, then drop, merge or (in training) mask."""
        if index not in self.layers:
            return tokens
        predictor = self.score_predictor[self.layers.index(index)]
        if self.training and self.merger is None:
            return self._masked(predictor, tokens)
        keep = self._schedule.keep(index, tokens.count, tokens.info, self.current_keep_rate)
        if keep == tokens.count:
            return tokens
        if self.training:
            return self.merged_by_samples(index, tokens, predictor, keep)
        score = predictor(tokens.patches)[..., 0]
        if self.merger is not None:
            return self.merged(index, tokens, score.exp(), score, keep)
        return tokens.reduced(index, Drop()(Seen(tokens.patches, importance=score), keep), score)

    def _masked(self, predictor: nn.Module, tokens: Tokens) -> Tokens:
        """All tokens, those that a sample drops masked out."""
        assert tokens.policy is not None
        prefix, policy = tokens.policy.split((tokens.prefix, tokens.count), dim=1)
        sample = F.gumbel_softmax(predictor(tokens.patches, policy), tau=1.0, hard=True)
        decision = sample[..., 0] * policy
        state = replace(tokens.state, decisions=(*tokens.state.decisions, decision))
        return tokens.replace(policy=torch.cat((prefix, decision), dim=1), state=state)

    def _per_image(self) -> bool:
        return self.ratio_per_image

    def _token_loss(self) -> Literal["mse", "kl"]:
        return self.token_loss

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Predictors at full rate; the backbone slower and frozen at first; class token and
        positions never trained.
        """
        slow = {"lr": lr, "lr_scale": self.backbone_lr_scale}
        fast = {"lr": lr, "lr_scale": 1.0, "freeze_epochs": 0}
        return self._paced(model, weight_decay, slow, fast)
