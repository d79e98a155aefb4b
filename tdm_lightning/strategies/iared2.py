"""IA-RED²: a policy, learned by reinforcement, decides group by group of blocks which patches an
image keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdm_lightning.core.checks import check_count, check_number
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.output import Output
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.interpreter import MultiHeadInterpreter
from tdm_lightning.strategies.objective import Criterion, TrainingObjective


class Stage(NamedTuple):
    """A step of the curriculum.

    Attributes:
        group: the group that learns, from 0; those before it decide as at inference, those after it
            drop nothing more.
        interpreting: its interpreter learns; otherwise its blocks and all that follow do.
    """

    group: int
    interpreting: bool


@dataclass(frozen=True)
class PolicyState:
    """What a pass notes of its decisions.

    Attributes:
        initial: number of patches at first.
        group: the last group that decided.
        kept: patches that each image kept there, B.
        log_probability: of the policy that was drawn, B; where an interpreter learns.
    """

    initial: int
    group: int = 0
    kept: Tensor | None = None
    log_probability: Tensor | None = None


class IARED2(Strategy, TrainingObjective):
    """Drops, before each group of blocks, the patches that an interpreter finds unimportant (Pan et
    al., NeurIPS 2021).

    At inference a patch stays while its score exceeds ``threshold``; the others are removed for
    good, as many as the image allows. DeiT-S has three groups: decisions fall before blocks 0, 4
    and 8, the first on the bare patch embeddings.

    Training is a curriculum over the epochs of one run, group by group:

    1. The group's interpreter learns for ``interpreter_epochs``, nothing else. A policy u is drawn
       from its scores I, ``u_j ~ Bernoulli(I_j)``, and reinforced by ``(R(u) - R(û))·∇log
       π(u)``, where û is what inference would keep, see :meth:`reward` and :meth:`second_pass`.
    2. The group's blocks and all that follow learn the task for ``block_epochs`` under drawn
       policies.

    Groups whose turn has not come drop nothing. Interpreters start out keeping every patch, so
    training starts from the plain model, and the weights of any epoch are complete. Where training
    stands follows from the epoch alone, see :meth:`stage_at`; the last stage lasts as long as the
    run.

    Networks, thresholds and groups are those of the authors' published tool. Their training code is
    not public: reward and curriculum follow the paper, while epochs, rates, initial weights, the
    thresholded policy of earlier groups and the meaning of the tool's penalties are readings.

    Args:
        groups: into how many equal groups the blocks fall.
        threshold: score above which a patch stays, in [0, 1).
        heads: of the interpreters; ``None``: as many as the model's own attention has.
        penalty: τ, the loss of reward for a wrong prediction, for each group; further groups take
            the last.
        interpreter_epochs: how long each group's interpreter learns.
        block_epochs: how long the blocks learn after it.
        interpreter_lr: learning rate of the interpreters.

    Attributes:
        stage: where training stands; set by :meth:`on_progress`, which a training loop of your own
            must call. Until then, as after the curriculum: all groups decide.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    adaptive = True

    def __init__(
        self,
        groups: int = 3,
        threshold: float = 0.5,
        heads: int | None = None,
        penalty: Sequence[float] = (3.0, 5.0, 8.0),
        interpreter_epochs: int = 10,
        block_epochs: int = 20,
        interpreter_lr: float = 4e-5,
    ) -> None:
        super().__init__()
        self.groups = check_count(groups, "groups")
        self.threshold = check_number(threshold, "threshold")
        if self.threshold >= 1:
            raise SettingError(
                f"threshold must lie in [0, 1), got {threshold!r}; no score exceeds 1"
            )
        self.heads = None if heads is None else check_count(heads, "heads")
        self.penalty = _check_penalty(penalty)
        self.interpreter_epochs = check_count(interpreter_epochs, "interpreter_epochs")
        self.block_epochs = check_count(block_epochs, "block_epochs")
        self.interpreter_lr = check_number(interpreter_lr, "interpreter_lr")
        self.stage = Stage(self.groups - 1, interpreting=False)
        self.interpreters = nn.ModuleList()

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Make an interpreter for each group.

        Raises:
            ValueError: if the model has no class token, or groups or heads do not divide it evenly.
        """
        if not info.class_tokens:
            raise SettingError(
                "IA-RED² scores patches by the class token, and this model has none; take one with"
                " a class token, or a strategy without it (DyViT, ToMe)"
            )
        if info.depth % self.groups:
            raise SettingError(
                f"groups={self.groups} does not divide the model's {info.depth} blocks evenly;"
                " choose a divisor"
            )
        heads = self.heads or info.heads
        if info.width % heads:
            raise SettingError(
                f"heads={heads} does not divide the model's width {info.width} evenly; choose a"
                " divisor"
            )
        self.interpreters.extend(
            MultiHeadInterpreter(info.width, heads).to(info.device) for _ in range(self.groups)
        )

    def begin(self, tokens: Tokens) -> Tokens:
        """Note how many patches there are at first."""
        return tokens.replace(state=PolicyState(tokens.count))

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Before a group: score, decide, remove."""
        group, inside = divmod(index, tokens.info.depth // self.groups)
        if inside or group > self.stage.group:
            return tokens
        x = tokens.x.detach()  # neither the score nor a group's loss reaches what lies before it
        score = self.interpreters[group](x[:, :1], x[:, tokens.prefix :])
        learns = self.training and group == self.stage.group
        kept = torch.bernoulli(score.detach()).bool() if learns else score > self.threshold
        kept = kept & tokens.valid_patches
        state = replace(tokens.state, kept=kept.sum(dim=1), group=group)
        if learns and self.stage.interpreting:
            chance = torch.where(kept, score, 1 - score).masked_fill(~tokens.valid_patches, 1)
            state = replace(state, log_probability=chance.log().sum(dim=1))
        elif learns:
            tokens = tokens.replace(x=x)
        return tokens.replace(state=state).packed(index, kept, score)

    @torch.no_grad()
    def reward(self, output: Output, target: Tensor) -> Tensor:
        """What the policy of a pass earned with each image, B, float32.

        ``share·(1 - (kept/N)²)`` for a right prediction, ``-τ`` for a wrong one: few patches
        pay, as long as they suffice. The share is that of the blocks from the deciding group on.
        With soft targets, B×classes, the largest one is right.
        """
        group = output.state.group
        labels = target.argmax(dim=-1) if target.ndim > 1 else target
        right = output.logits.argmax(dim=-1) == labels
        gain = (1 - group / self.groups) * (1 - self._kept(output).square())
        return torch.where(right, gain, -self.penalty[min(group, len(self.penalty) - 1)])

    @torch.no_grad()
    def second_pass(self, model: Any, images: Tensor) -> Output | None:
        """The pass of inference, while an interpreter learns: its reward is what a drawn policy
        must beat.
        """
        if not self.stage.interpreting:
            return None
        training = self.training
        self.eval()
        try:
            return model.run(images)
        finally:
            self.train(training)

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The ``policy`` gradient's loss where an interpreter learns, the task loss where blocks
        do.

        Raises:
            ValueError: if an interpreter learns and ``teacher``, what :meth:`second_pass` gave for
                the same images, is missing.
        """
        log_probability = output.state.log_probability
        if log_probability is None:
            return super().loss(output, target, criterion, teacher)
        if teacher is None:
            raise SettingError(
                "IA-RED² compares a drawn policy with the one of inference: pass"
                " strategy.second_pass(model, images) as teacher"
            )
        advantage = self.reward(output, target) - self.reward(teacher, target)
        return {"policy": -(advantage * log_probability).mean()}

    def report(self, output: Output, target: Tensor) -> dict[str, Tensor]:
        """Mean ``reward`` and ``kept`` share of the patches."""
        return {"reward": self.reward(output, target).mean(), "kept": self._kept(output).mean()}

    def _kept(self, output: Output) -> Tensor:
        return output.state.kept / output.state.initial

    def stage_at(self, epoch: int) -> Stage:
        """The step of the curriculum that epoch ``epoch``, from 0, belongs to.

        >>> strategy = IARED2(groups=2, interpreter_epochs=1, block_epochs=2)
        >>> [tuple(strategy.stage_at(epoch)) for epoch in range(5)]
        [(0, True), (0, False), (0, False), (1, True), (1, False)]
        """
        length = self.interpreter_epochs + self.block_epochs
        group = min(epoch // length, self.groups - 1)
        return Stage(group, epoch - group * length < self.interpreter_epochs)

    def on_progress(self, epoch: int, step: int, total_steps: int) -> None:
        """Take the step of the curriculum that belongs to the epoch."""
        self.stage = self.stage_at(epoch)

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Interpreters at their own learning rate. What a stage does not train gets no gradient, so
        optimizers pass it by.
        """
        fixed = model.no_weight_decay()
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": rate, "weight_decay": decay}
            for rate in (lr, self.interpreter_lr)
            for decay in (weight_decay, 0.0)
        ]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                free = parameter.ndim <= 1 or name in fixed
                groups[2 * name.startswith("strategy.") + free]["params"].append(parameter)
        return [group for group in groups if group["params"]]


def _check_penalty(penalty: Any) -> tuple[float, ...]:
    if isinstance(penalty, str) or not isinstance(penalty, Sequence):
        raise SettingTypeError(
            f"penalty must be a sequence of numbers such as (3, 5, 8), got {penalty!r}"
        )
    if not penalty:
        raise SettingError("penalty must hold at least one number")
    return tuple(check_number(value, "penalty") for value in penalty)
