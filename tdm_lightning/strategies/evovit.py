"""Evo-ViT: every token stays, but late blocks update only the informative half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_count, check_keep_rate, check_layers, check_layers_exist
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.output import Output
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.mergers import Drop, Merger
from tdm_lightning.mergers.base import check_merger
from tdm_lightning.ops import combine, gather_tokens, inverse_order, rank_order
from tdm_lightning.strategies.base import Requirements, Strategy
from tdm_lightning.strategies.objective import Criterion, TrainingObjective


@dataclass(frozen=True)
class EvoState:
    """What a pass carries from block to block.

    Attributes:
        attention: running class attention of each patch token, those in the blocks first, B×(N+P).
        parked: tokens that wait outside the blocks, B×P×C; ``None``: none.
        stand_in: what ran in their place when it started, B×S×C; ``None``: nothing.
        stands_for: which of those runs for each parked token, B×P, int64.
        class_logits: of the second classifier; in training.
    """

    attention: Tensor | None = None
    parked: Tensor | None = None
    stand_in: Tensor | None = None
    stands_for: Tensor | None = None
    class_logits: Tensor | None = None


class EvoViT(Strategy, TrainingObjective):
    """Updates the tokens with the highest running class attention; the others wait and come back
    (Xu et al., AAAI 2022).

    ``int(keep_rate·N)`` of N tokens are updated (Evo-ViT; ``YifanXu74/Evo-ViT``). The running
    attention is ``g ← (1-t)·g + t·a`` with the block's class attention a, summed over heads,
    and the trade-off t; of tokens that wait, g stays as it is. The choice is made anew at each
    selecting layer, after all have come back. The head averages over all patches, so the model must
    be made with ``global_pool="avg"``. DeiT-S at 0.5: blocks 0–3 update 196 patches, blocks
    4–11 98.

    While tokens wait they can share in what the blocks do: ``representative`` lets one
    attention-weighted mean of them run with the others and adds its change to each when they come
    back; ``merger`` does the same with one token per cluster, ``ceil(cluster_fraction·N_waiting)``
    of them, which attract attention in proportion to the tokens they run for (how Evo-ViT and the
    token merger combine is a reading). The released DeiT weights were trained with neither.

    Args:
        keep_rate: share of the patch tokens that is updated, in (0, 1].
        tradeoff: t, for all blocks or one per block, each in [0, 1]; ``None``: 1 before the first
            selecting layer and 0.5 from there, as in the released models.
        class_head: in training, a second classifier on the class token shares the loss (as the
            published recipe has it).
        merger: its :meth:`~tdm_lightning.Merger.represent` says what runs in place of the waiting
            tokens.
        layers: blocks before which tokens are selected, counted from 0.
        representative: one mean runs in place of the waiting tokens; not together with a merger.
        drop_last: tokens that the last selection leaves out do not come back for the head
            (``prunecls`` of the official code).
        layerwise_epochs: training epochs at the start in which every block from the first selecting
            layer on selects anew; 200 in the published recipe.

    Attributes:
        layerwise: whether every block selects now; set by :meth:`on_progress`, as
            ``current_keep_rate`` is.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.5,
        tradeoff: float | Sequence[float] | None = None,
        class_head: bool = False,
        merger: Merger | None = None,
        layers: Sequence[int] = (4, 8),
        representative: bool = False,
        drop_last: bool = False,
        layerwise_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.keep_rate = check_keep_rate(keep_rate)
        self.tradeoff = _check_tradeoff(tradeoff)
        self.class_head = bool(class_head)
        self.merger = check_merger(merger, {"importance"})
        self.layers = check_layers(layers)
        if 0 in self.layers:
            raise SettingError(
                "layers must be at least 1: before the first block there is no attention to"
                " select by"
            )
        self.representative = bool(representative)
        self.drop_last = bool(drop_last)
        self.layerwise_epochs = check_count(layerwise_epochs, "layerwise_epochs", least=0)
        self.layerwise = False
        if isinstance(merger, Drop):
            raise SettingError("Drop leaves nothing to run in place of the waiting tokens")
        if self.representative and merger is not None:
            raise SettingError(
                "representative=True and a merger are two ways to run for the waiting tokens;"
                " choose one"
            )

    def requires(self) -> Requirements:
        """A head that averages over the patches; tokens that stand nowhere run too."""
        return Requirements(pooling="patches", absolute_positions=True)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check the settings against the model; make the second classifier.

        Raises:
            ValueError: if layers or trade-offs do not fit its depth, no token would be updated, it
                does not pool over its patches, or has no class token for ``class_head``.
        """
        depth = info.depth
        check_layers_exist(self.layers, depth)
        if isinstance(self.tradeoff, tuple) and len(self.tradeoff) != depth:
            raise SettingError(
                f"tradeoff needs one number per block, {depth} here, got {len(self.tradeoff)}"
            )
        if info.pooling == "token":
            raise SettingError(
                "Evo-ViT's head averages over the patches, but this model classifies by its class"
                " token; create the timm model with global_pool='avg'"
            )
        self._keep(info.patches)
        if self.class_head:
            self._make_class_head(info)

    def _make_class_head(self, info: ModelInfo) -> None:
        if not info.class_tokens or not info.num_classes:
            raise SettingError(
                "class_head=True needs a model with a class token and a classifier; use"
                " class_head=False"
            )
        self.norm_cls = nn.LayerNorm(info.width, eps=1e-6, device=info.device)
        self.head_cls = _classifier(info.width, info.num_classes, info.device)

    def reset_classifier(self, num_classes: int) -> None:
        """Give the class token's classifier as many classes."""
        if self.class_head:
            self.head_cls = _classifier(
                self.head_cls.in_features, num_classes, self.head_cls.weight.device
            )

    def begin(self, tokens: Tokens) -> Tokens:
        """No token ever stands for several patches for good, so sizes need not be followed."""
        return tokens.replace(size=None, state=EvoState())

    def needs(self, index: int, info: ModelInfo) -> frozenset[str]:
        """Importance in every block that a later selection looks back on."""
        if not self.layers:
            return frozenset()
        # Before the first selection all tokens are updated, so a trade-off of 1 forgets what was
        # before.
        forget = [block for block in range(self.layers[0]) if self._mix(block) == 1]
        looks_back = self.layerwise or index < self.layers[-1]
        if looks_back and index >= max(forget, default=0):
            return frozenset({"importance"})
        return frozenset()

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Select anew, in the selecting layers."""
        if not self._selects(index):
            return tokens
        return self._select(index, _rejoined(tokens))

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Update the running attention of the tokens that are here."""
        if seen.importance is None:
            return tokens
        now = seen.importance * tokens.info.heads  # summed over the heads
        running = tokens.state.attention
        if running is not None:
            mix, here = self._mix(index), now.shape[1]
            now = torch.cat(((1 - mix) * running[:, :here] + mix * now, running[:, here:]), dim=1)
        return tokens.replace(state=replace(tokens.state, attention=now))

    def finish(self, tokens: Tokens) -> Tokens:
        """All come back; in training, also classify the class token."""
        tokens = _rejoined(tokens)
        if not (self.class_head and self.training):
            return tokens
        logits = self.head_cls(self.norm_cls(tokens.x[:, 0]))
        return tokens.replace(state=replace(tokens.state, class_logits=logits))

    def all_patches(self, tokens: Tokens) -> Tensor:
        """Those in the blocks, then the parked ones."""
        parked = tokens.state.parked
        return tokens.patches if parked is None else torch.cat((tokens.patches, parked), dim=1)

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """Half the task loss from the averaged patches and half from the class token, where it was
        classified.
        """
        terms = super().loss(output, target, criterion, teacher)
        second = output.state.class_logits
        if second is None:
            return terms
        return {"task": 0.5 * terms["task"], "class_head": 0.5 * criterion(second, target)}

    def on_progress(self, epoch: int, step: int, total_steps: int) -> None:
        """Select in every block during the first ``layerwise_epochs``."""
        self.layerwise = epoch < self.layerwise_epochs

    def _mix(self, index: int) -> float:
        if self.tradeoff is None:
            return 1.0 if index < self.layers[0] else 0.5
        return self.tradeoff[index] if isinstance(self.tradeoff, tuple) else self.tradeoff

    def _selects(self, index: int) -> bool:
        return index in self.layers or (
            self.layerwise and bool(self.layers) and index > self.layers[0]
        )

    def _keep(self, n: int) -> int:
        keep = int(self.annealed(self.keep_rate) * n)
        if keep < 1:
            raise SettingError(
                f"keep_rate={self.keep_rate} leaves none of {n} tokens to update; raise it"
            )
        return keep

    def _select(self, index: int, tokens: Tokens) -> Tokens:
        n, keep = tokens.count, self._keep(tokens.count)
        if keep == n:
            return tokens
        before = tokens.state.attention
        order = rank_order(before)
        x, running = gather_tokens(tokens.patches, order), before.gather(1, order)
        rank = inverse_order(order)
        last = not any(self._selects(later) for later in range(index + 1, tokens.info.depth))
        if self.drop_last and last:
            fate, role = torch.where(rank < keep, rank, -1), Role.DROPPED
        else:
            fate, role = rank, Role.PARKED
        reduction = Reduction(
            x[:, :keep], fate, torch.where(rank < keep, int(Role.KEPT), int(role))
        )
        tokens = tokens.reduced(index, reduction, before)
        if role is Role.DROPPED:
            return tokens.replace(state=EvoState(running[:, :keep]))
        state = EvoState(running, parked=x[:, keep:])
        return self._represented(tokens, state, running[:, keep:])

    def _represented(self, tokens: Tokens, state: EvoState, attention: Tensor) -> Tokens:
        """Let a few tokens run for the parked ones, beside the prefix tokens."""
        parked = state.parked
        assert parked is not None
        if self.merger is not None:
            size = torch.ones_like(attention, dtype=parked.dtype)
            merged = self.merger.represent(Seen(parked, size, attention))
            stand_in, group = merged.x, merged.assignment
        elif self.representative:
            group = torch.zeros_like(attention, dtype=torch.int64)
            stand_in, _ = combine(parked, group, attention, attention, 1)
        else:
            return tokens.replace(state=state)
        if self.merger is not None and self.merger.proportional_attention:
            members = merged.totals(torch.ones_like(attention, dtype=parked.dtype))
            bias = F.pad(members.log(), (tokens.prefix, tokens.count))
            tokens = tokens.replace(key_bias=bias[:, None, None, :])
        x = torch.cat((tokens.x[:, : tokens.prefix], stand_in, tokens.patches), dim=1)
        state = replace(state, stand_in=stand_in, stands_for=group)
        return tokens.replace(x=x, prefix=tokens.prefix + stand_in.shape[1], state=state)


def _rejoined(tokens: Tokens) -> Tokens:
    """Parked tokens behind the others again, changed as their stand-in was."""
    state: EvoState = tokens.state
    prefix, parked = tokens.prefix, state.parked
    if parked is None:
        return tokens
    if state.stand_in is not None:
        assert state.stands_for is not None
        prefix -= state.stand_in.shape[1]
        change = tokens.x[:, prefix : tokens.prefix] - state.stand_in
        parked = parked + gather_tokens(change, state.stands_for)
    x = torch.cat((tokens.x[:, :prefix], tokens.patches, parked), dim=1)
    return tokens.replace(x=x, prefix=prefix, key_bias=None, state=EvoState(state.attention))


def _classifier(width: int, classes: int, device: torch.device | None) -> nn.Linear:
    layer = nn.Linear(width, classes, device=device)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _check_tradeoff(value: Any) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    numbers: Any = [value] if isinstance(value, Real) else value
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise SettingTypeError(
            f"tradeoff must be a number in [0, 1] or one per block, got {value!r}"
        )
    if any(isinstance(number, bool) or not isinstance(number, Real) for number in numbers):
        raise SettingTypeError(f"tradeoff must hold numbers in [0, 1], got {value!r}")
    if not all(0 <= number <= 1 for number in numbers):
        raise SettingError(f"tradeoff must lie in [0, 1], got {value!r}")
    return float(value) if isinstance(value, Real) else tuple(map(float, numbers))
