"""SPViT: learned selectors pack the tokens that can go into one token per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_choice, check_keep_rate
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Reduction, Role
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.mergers import Merger
from tdm_lightning.ops import gather_tokens, inverse_order, pack, rank_order
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.schedules import SearchSpace
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.learned import LearnedSelection, LearnedState
from tdm_lightning.strategies.selector import MultiHeadSelector

#: Shares of the patches that the official training holds its three stages to.
_OFFICIAL = (0.617, 0.369, 0.137)


@dataclass(frozen=True)
class PackageState(LearnedState):
    """What a pass notes beside its decisions.

    Attributes:
        packages: which patch tokens are packages, B×N, bool.
        left: patches left where counts are fixed, packages not counted.
    """

    packages: Tensor | None = None
    left: int = 0


class SPViT(LearnedSelection):
    """Packs, before some blocks, the patches that are not needed into one package token (Kong et
    al., ECCV 2022).

    A :class:`~tdm_lightning.strategies.selector.MultiHeadSelector` scores every token. In training
    mode all tokens stay: Gumbel-softmax decisions mask them out of everyone else's attention, a
    dropped patch never returns, and a loss holds the share that is kept, on average over the batch,
    to the stage's target. Each stage appends one package token that stands for the patches it
    dropped and that every later token sees; packages are scored with the patches but never dropped.

    At inference a patch stays where keeping outscores dropping, so every image keeps its own number
    of patches: they are gathered to the longest, padding masked, and an image's logits are those of
    masking. With ``fixed_count`` stage s instead keeps the ``int(target_s · N0)`` patches that
    keeping outscores dropping by most: 120, 72 and 26 of DeiT-S's 196, and one, two and three
    packages; then shapes are static. Nothing is drawn at random, unless ``stochastic``. Training
    holds *sampled* decisions to the targets: while selectors are unsure, thresholds keep other
    shares than samples do, and only ``fixed_count`` meets a budget for certain. The same weights
    serve all modes.

    With a merger (and ``fixed_count``) the dropped patches are clustered and the kept ones matched
    instead, down to the stage's count, by their keep probability. Training then merges as inference
    does, as :class:`~tdm_lightning.DyViT` does it.

    Official (``PeiyanFlying/SPViT``): selectors, masks, packages and losses. Readings:
    deterministic and fixed-count inference (the official one samples, and removes tokens from
    single images only); a stage that drops nothing of an image adds no package to it, where the
    official code adds a zero token; the merger; a mean in training. The paper's search for targets
    under a latency table is not public.

    Args:
        layers: blocks *before* which patches are packed, counted from 0.
        targets: share of the initial patches that each layer leaves, in (0, 1], none above the one
            before. ``None``: the official 0.617, 0.369, 0.137 for three layers, powers of 0.617 for
            another number of them.
        merger: combines tokens in place of the packages; only with ``fixed_count``.
        fixed_count: keep as many patches of every image, see above.
        stochastic: draw Gumbel noise at inference too, as the official code does.
        package: the ``"sum"`` of the patches a stage drops, each times its keep probability, as in
            the official training code; or their plain ``"mean"``, as in its separate inference
            code.
        shared_heads: one MLP for all heads of a selector, as the official code has it, or one for
            each.
        ratio_weight: weight of the loss on the kept share.
        distill_weight: weight of the divergence from the teacher's logits; 0: none.
        token_weight: weight of the squared distance to the teacher's tokens, over the patches that
            are left; 0: none. Without both no teacher is needed.
        backbone_lr_scale: the backbone's learning rate as a share of the selectors'. ``None``
            trains everything alike, as from scratch.
        freeze_epochs: epochs in which the backbone does not learn; only with a
            ``backbone_lr_scale``.

    Attributes:
        adaptive: whether images keep different numbers of tokens: unless ``fixed_count``.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 6, 9),
        targets: Sequence[float] | None = None,
        merger: Merger | None = None,
        fixed_count: bool = False,
        stochastic: bool = False,
        package: Literal["sum", "mean"] = "sum",
        shared_heads: bool = True,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_weight: float = 0.5,
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
        self.targets = _check_targets(targets, self.layers)
        self.fixed_count = bool(fixed_count)
        if merger is not None and not self.fixed_count:
            raise SettingError(
                "SPViT merges down to a fixed count: with a merger, set fixed_count=True"
            )
        self.stochastic = bool(stochastic)
        self.package = check_choice(package, ("sum", "mean"), "package")
        self.shared_heads = bool(shared_heads)
        self.adaptive = not self.fixed_count

    def shares(self) -> tuple[float, ...]:
        """See :class:`LearnedSelection`."""
        return self.targets

    def keep_count(self, stage: int, initial: int) -> int:
        """Patches left after ``stage`` (from 1) of ``initial`` where counts are fixed; rounded
        down.

        Raises:
            ValueError: if none is left.
        """
        target, layer = self.targets[stage - 1], self.layers[stage - 1]
        keep = int(initial * target)
        if keep < 1:
            raise SettingError(
                f"a target of {target} leaves none of {initial} patches at layer {layer}; raise it,"
                " or let images keep their own numbers of patches (fixed_count=False)"
            )
        return keep

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Make a selector for each stage.

        Raises:
            ValueError: if a layer is out of range, the heads do not divide the width, or a fixed
                count or merger leaves no token.
        """
        super().bind(vit, info)
        for stage in range(1, len(self.layers) + 1) if self.fixed_count else ():
            self.keep_count(stage, info.patches)
        if info.width % info.heads:
            raise SettingError(
                f"SPViT gives every attention head a slice of the token, and {info.heads} heads do"
                f" not divide {info.width}"
            )
        self.score_predictor.extend(
            MultiHeadSelector(info.width, info.heads, self.shared_heads).to(info.device)
            for _ in self.layers
        )

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """Where counts are fixed: targets that are powers of one share, in thousandths."""
        if not self.fixed_count:
            return None
        stages = range(1, len(self.layers) + 1)
        return SearchSpace(
            1000,
            lambda step: self.changed(
                targets=[round((step / 1000) ** stage, 6) for stage in stages]
            ),
        )

    def begin(self, tokens: Tokens) -> Tokens:
        """Note which tokens are patches: all; in training, let each be attended to."""
        tokens = super().begin(tokens)
        none = torch.zeros(tokens.patches.shape[:2], dtype=torch.bool, device=tokens.x.device)
        state = PackageState(tokens.count, tokens.state.decisions, None, none, tokens.count)
        return tokens.replace(state=state)

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Score, then pack, merge or (in training) mask."""
        if index not in self.layers:
            return tokens
        stage = self.layers.index(index)
        selector, state = self.score_predictor[stage], tokens.state
        if self.training and self.merger is None:
            return self._masked(index, tokens, selector)
        if not self.fixed_count:
            return self._packed(index, tokens, selector)
        keep = min(state.left, self.keep_count(stage + 1, state.initial))
        if keep == state.left:
            return tokens
        tokens = tokens.replace(state=replace(state, left=keep))
        if self.merger is None:  # the packages that are there stay
            return self._packed(index, tokens, selector, keep + tokens.count - state.left)
        if self.training:
            return self.merged_by_samples(
                index, tokens, lambda x, policy: selector(x, policy)[0], keep
            )
        score, _ = self._scores(selector, tokens)
        return self.merged(index, tokens, score.sigmoid(), score, keep)

    def _masked(self, index: int, tokens: Tokens, selector: nn.Module) -> Tokens:
        """All tokens, with a package of those that a sample drops, and a policy on them."""
        assert tokens.policy is not None
        state, count = tokens.state, tokens.count
        prefix, policy = tokens.policy.split((tokens.prefix, count), dim=1)
        votes, probability = selector(tokens.patches, policy)
        sample = F.gumbel_softmax(votes, tau=1.0, hard=True)[..., 0]
        decision = torch.where(state.packages, 1.0, sample) * policy
        leaves = policy - decision
        x = torch.cat((tokens.patches, self._packaged(tokens.patches, leaves, probability)), dim=1)
        kept, dropped = decision > 0.5, leaves > 0.5
        here = torch.arange(count, device=x.device)
        # Nobody is held by what was dropped before.
        assignment = torch.where(kept, here, torch.where(dropped, count, -1))
        role = torch.where(dropped, int(Role.CLUSTERED), int(Role.KEPT))
        tokens = tokens.reduced(index, Reduction(x, assignment, role), _margin(votes))
        package = dropped.any(dim=1, keepdim=True).to(decision.dtype)
        return tokens.replace(
            policy=torch.cat((prefix, decision, package), dim=1),
            state=replace(
                state,
                decisions=(*state.decisions, decision[:, : state.initial]),
                packages=F.pad(state.packages, (0, 1), value=True),
            ),
        )

    def _packed(
        self, index: int, tokens: Tokens, selector: nn.Module, keep: int | None = None
    ) -> Tokens:
        """The tokens that stay, former packages behind the patches, and the new package last.

        Args:
            index: the block.
            tokens: those that enter.
            selector: scores them.
            keep: how many of each image stay, fewer than enter; ``None``: as many as the selector
                chooses.
        """
        present, package = tokens.valid_patches, tokens.state.packages
        score, probability = self._scores(selector, tokens)
        if keep is None:
            kept = present & ((score > 0) | package)
        else:
            kept = inverse_order(rank_order(score.masked_fill(package, torch.inf))) < keep
        dropped = present & ~kept
        # A package of nothing does not stay.
        stays = torch.cat((kept, dropped.any(dim=1, keepdim=True)), dim=1)
        order, valid = pack(stays) if keep is None else (_positions(stays, keep + 1), None)
        packaged = self._packaged(tokens.patches, dropped.float(), probability)
        x = gather_tokens(torch.cat((tokens.patches, packaged), dim=1), order)
        package = F.pad(package, (0, 1), value=True).gather(1, order)
        if valid is not None:
            x, package = x.masked_fill(~valid.unsqueeze(-1), 0), package & valid
        slot = stays.cumsum(dim=1) - 1
        assignment = torch.where(kept, slot[:, :-1], torch.where(dropped, slot[:, -1:], -1))
        role = torch.where(kept, int(Role.KEPT), int(Role.CLUSTERED))
        tokens = tokens.reduced(index, Reduction(x, assignment, role), score)
        tokens = tokens.replace(state=replace(tokens.state, packages=package))
        if valid is None:
            return tokens
        return tokens.masked(F.pad(valid, (tokens.prefix, 0), value=True))

    def _scores(self, selector: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By how much keeping outscores dropping, and the keep probability, both B×N."""
        present = None if tokens.valid is None else tokens.valid_patches.float()
        votes, probability = selector(tokens.patches, present)
        if self.stochastic:
            votes = votes - torch.empty_like(votes).exponential_().log()
        return _margin(votes), probability

    def _packaged(self, x: Tensor, leaves: Tensor, probability: Tensor) -> Tensor:
        """One token for those of B×N×C that leave, B×1×C; zero where none does."""
        with full_precision(x.device):
            if self.package == "sum":
                weight = leaves * probability
            else:
                weight = leaves / leaves.sum(1, keepdim=True).clamp(min=1)
            return (weight.unsqueeze(1) @ x.float()).to(x.dtype)

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Selectors at full rate; the backbone slower, on a cosine of its own, and frozen at first;
        positions never trained.
        """
        slow = {"lr": lr * (self.backbone_lr_scale or 0.0)}
        return self._paced(model, weight_decay, slow, {"lr": lr})


def _margin(votes: Tensor) -> Tensor:
    """By how much keeping outscores dropping, B×N, of B×N×2."""
    return votes[..., 0] - votes[..., 1]


def _positions(stays: Tensor, count: int) -> Tensor:
    """Where the ``count`` tokens of each image that stay lie, in their order; B×N bool to B×count
    int64.
    """
    return rank_order(stays * torch.arange(stays.shape[1], 0, -1, device=stays.device))[:, :count]


def _check_targets(targets: Sequence[float] | None, layers: Sequence[int]) -> tuple[float, ...]:
    if targets is None:
        stages = range(1, len(layers) + 1)
        return (
            _OFFICIAL
            if len(layers) == len(_OFFICIAL)
            else tuple(_OFFICIAL[0] ** stage for stage in stages)
        )
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise SettingTypeError(
            f"targets must be a sequence of shares such as {_OFFICIAL}, got {targets!r}"
        )
    if len(targets) != len(layers):
        raise SettingError(
            f"targets must hold one share for each of the layers {list(layers)}, got"
            f" {list(targets)}"
        )
    checked = tuple(check_keep_rate(target, "targets") for target in targets)
    if list(checked) != sorted(checked, reverse=True):
        raise SettingError(
            "targets are shares of the initial patches and cannot grow from layer to layer, got"
            f" {list(targets)}"
        )
    return checked
