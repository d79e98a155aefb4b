"""DynamicViT: small networks learn which tokens can go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.checks import check_choice, check_count
from tdm_lightning.ops import merge_groups
from tdm_lightning.strategies.base import Criterion
from tdm_lightning.strategies.merger import TokenMerger, check_early_merger
from tdm_lightning.strategies.predictor import KeepPredictor
from tdm_lightning.strategies.staged import StagedStrategy, keep_best
from tdm_lightning.tokens import Output, Reduction, Tokens


class DyViT(StagedStrategy):
    """Predicts before some blocks which patch tokens to keep (Rao et al., NeurIPS 2021; ``raoyongming/DynamicViT``).

    At inference stage s keeps the ``int(keep_rate^s · N0)`` best-scored tokens, best first, and the rest is gone; DeiT-S at
    0.7: 196 → 137 → 96 → 67. In training mode all tokens stay: Gumbel-softmax decisions mask them out of everyone else's
    attention, a dropped token never returns, and the share that is kept is held to the schedule by a loss. The predictors
    only learn in training mode.

    With a merger the tokens that would be dropped are clustered and the kept ones matched, down to the schedule's count,
    with the predictors' keep probability as importance. Training then merges as inference does (no published system says
    how; this is a reading): the keep probabilities are Gumbel-softmax samples, so the choice varies; gradients reach
    predictors and backbone through the weights of the combined tokens and through a policy on them that is 1 but passes
    gradients to the decisions.

    Args:
        keep_rate: share of the initial patch tokens that is left at the first stage, its square at the second, and so on; in
            (0, 1].
        layers: blocks *before* which tokens are dropped, counted from 0.
        merger: combines tokens instead of dropping them.
        ratio_weight: λ of the loss on the kept share; the official commands take 2 for DeiT-S and 5 for DeiT-B.
        distill_weight: weight of the divergence from the teacher's logits; 0: none.
        token_weight: weight of the distance to the teacher's tokens; 0: none. Without both no teacher is needed.
        token_loss: that distance: ``"mse"``, or the ``"kl"`` divergence of the features (LV-ViT).
        ratio_per_image: hold every image to the schedule, not just the mean over the batch.
        backbone_lr_scale: the backbone's learning rate as a share of the predictors'. ``None`` trains everything alike, as
            from scratch.
        freeze_epochs: epochs in which the backbone does not learn; only with a ``backbone_lr_scale``.

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
        self.ratio_weight = _check_weight(ratio_weight, "ratio_weight")
        self.distill_weight = _check_weight(distill_weight, "distill_weight")
        self.token_weight = _check_weight(token_weight, "token_weight")
        self.token_loss = check_choice(token_loss, ("mse", "kl"), "token_loss")
        self.ratio_per_image = bool(ratio_per_image)
        self.backbone_lr_scale = None if backbone_lr_scale is None else _check_weight(backbone_lr_scale, "backbone_lr_scale")
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
        """In training every token starts with a policy of 1: the ε of masked attention acts from the first block on."""
        tokens = super().begin(tokens)
        if not self.training:
            return tokens
        return tokens.carrying(decisions=()).replace(policy=torch.ones(tokens.x.shape[:2], device=tokens.x.device))

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Score, then drop, merge or (in training) mask."""
        if index not in self.layers:
            return tokens
        predictor, keep = self.score_predictor[self.layers.index(index)], self.to_keep(index, tokens)
        if self.training and self.merger is None:
            return self._mask(predictor, tokens)
        if keep == tokens.count:
            return tokens
        if self.training:
            return self._merge_sampled(index, predictor, tokens, keep)
        score = predictor(tokens.patches)[..., 0]
        if self.merger is None:
            return tokens.reduced(index, keep_best(tokens.patches, score, keep), score)
        return self._reduced(index, tokens, self.merger(tokens.patches, score.exp(), keep), score)

    def _mask(self, predictor: nn.Module, tokens: Tokens) -> Tokens:
        assert tokens.policy is not None
        prefix, policy = tokens.policy.split((tokens.prefix, tokens.count), dim=1)
        sample = F.gumbel_softmax(predictor(tokens.patches, policy), tau=1.0, hard=True)
        decision = sample[..., 0] * policy
        tokens = tokens.carrying(decisions=(*tokens.carry["decisions"], decision))
        return tokens.replace(policy=torch.cat((prefix, decision), dim=1))

    def _merge_sampled(self, index: int, predictor: nn.Module, tokens: Tokens, keep: int) -> Tokens:
        assert self.merger is not None
        assert tokens.policy is not None
        prefix, policy = tokens.policy.split((tokens.prefix, tokens.count), dim=1)
        probability = F.gumbel_softmax(predictor(tokens.patches, policy), tau=1.0, hard=False)[..., 0]
        reduction = self.merger(tokens.patches, probability, keep)
        # A straight-through 1 for every token, averaged inside each group: the forward pass attends to all alike, the backward
        # pass tells the predictor whether attending to a token helped, as the mask does where nothing is merged.
        through = policy * (1 + probability - probability.detach())
        members = reduction.sizes(torch.ones_like(through))
        policy = reduction.sizes(through) / members
        held = tokens.carry.get("holder")
        tokens = tokens.carrying(
            decisions=(*tokens.carry["decisions"], probability),
            holder=reduction.assignment if held is None else reduction.assignment.gather(1, held),
        )
        return self._reduced(index, tokens.replace(policy=torch.cat((prefix, policy), dim=1)), reduction, probability)

    def _reduced(self, index: int, tokens: Tokens, reduction: Reduction, score: Tensor) -> Tokens:
        tokens = tokens.reduced(index, reduction, score)
        return tokens.with_size_bias() if self.tracks_size() else tokens

    def loss(self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None) -> dict[str, Tensor]:
        """Task loss, ``ratio`` of kept tokens, and ``distillation`` and ``tokens`` against the teacher, each with its weight.

        Raises:
            ValueError: if the pass was not made in training mode, or the teacher is missing or of another shape.
        """
        terms = super().loss(output, target, criterion, teacher)
        decisions = output.carry.get("decisions")
        if decisions is None:
            raise ValueError("DyViT's predictors only learn in training mode: call model.train() before the forward pass")
        initial = output.carry["initial"]
        if decisions:
            share = torch.stack([decision.sum(1) for decision in decisions], dim=1) / initial
            share = share if self.ratio_per_image else share.mean(dim=0, keepdim=True)
            rate = self.annealed(self.keep_rate)
            wanted = share.new_tensor([rate**stage for stage in range(1, share.shape[1] + 1)])
            terms["ratio"] = self.ratio_weight * (share - wanted).square().mean()
        if self.needs_teacher:
            terms |= self._distillation(output, _check_teacher(output, teacher, initial), initial)
        return terms

    def _distillation(self, output: Output, teacher: Output, initial: int) -> dict[str, Tensor]:
        prefix = teacher.features.shape[1] - initial
        student, wanted = output.features[:, prefix:].float(), teacher.features[:, prefix:].float()
        holder = output.carry.get("holder")
        if holder is not None:  # a combined token is compared with the mean of the teacher's tokens that it stands for
            even = torch.ones_like(holder, dtype=torch.float32)
            count = even.new_zeros(student.shape[:2]).scatter_add(1, holder, even)
            wanted = merge_groups(wanted, holder, 1 / count.gather(1, holder), student.shape[1])
            kept = torch.ones_like(count)
        else:
            decisions = output.carry["decisions"]
            kept = decisions[-1].detach() if decisions else student.new_ones(student.shape[:2])
        squared = self.token_loss == "mse"
        distance = (student - wanted).square().mean(-1) if squared else _divergence(student, wanted)
        return {
            "distillation": self.distill_weight * _divergence(output.logits.float(), teacher.logits.float()).mean(),
            "tokens": self.token_weight * (distance * kept).sum() / kept.sum().clamp(min=1),
        }

    def param_groups(self, model: Any, lr: float, weight_decay: float) -> list[dict[str, Any]] | None:
        """Predictors at full rate; the backbone slower and frozen at first; class token and positions never trained."""
        if self.backbone_lr_scale is None:
            return None
        fixed = model.no_weight_decay()
        slow = {"lr_scale": self.backbone_lr_scale, "freeze_epochs": self.freeze_epochs}
        fast = {"lr_scale": 1.0, "freeze_epochs": 0}
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": lr, "weight_decay": decay, **pace} for pace in (slow, fast) for decay in (weight_decay, 0.0)
        ]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in fixed:
                groups[2 * name.startswith("strategy.") + (parameter.ndim <= 1)]["params"].append(parameter)
        return [group for group in groups if group["params"]]


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two sets of logits over the last dimension."""
    student, teacher = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _check_teacher(output: Output, teacher: Output | None, initial: int) -> Output:
    if teacher is None:
        raise ValueError(
            "DyViT distils from the unreduced model: pass its output as teacher, or set distill_weight=0 and token_weight=0"
        )
    same = teacher.logits.shape == output.logits.shape
    batch, length, width = teacher.features.shape
    prefix = length - initial
    if not same or prefix < 0 or (batch, width) != (output.features.shape[0], output.features.shape[2]):
        raise ValueError(
            f"the teacher's logits {tuple(teacher.logits.shape)} and features {tuple(teacher.features.shape)} do not fit the "
            f"student's {tuple(output.logits.shape)} and {tuple(output.features.shape)} with {initial} patches; the "
            f"teacher must be the same timm model, unreduced, on the same images"
        )
    return teacher


def _check_weight(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of at least 0, got {value!r} of type {type(value).__name__}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return float(value)
