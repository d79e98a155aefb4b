"""Evo-ViT: every token stays, but late blocks update only the informative half."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_count, check_keep_rate, check_layers, check_layers_exist
from tdm_lightning.core.tokens import Observed, Output, Reduction, Role, Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.mergers.token_merger import TokenMerger, check_early_merger
from tdm_lightning.ops import gather_tokens, group_weights, inverse_order, merge_groups, rank_order
from tdm_lightning.strategies.base import Criterion, Strategy


class EvoViT(Strategy):
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
        merger: clusters that run in place of the waiting tokens.
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

    absolute_positions_only = True
    global_pool = "avg"

    def __init__(
        self,
        keep_rate: float = 0.5,
        tradeoff: float | Sequence[float] | None = None,
        class_head: bool = False,
        merger: TokenMerger | None = None,
        layers: Sequence[int] = (4, 8),
        representative: bool = False,
        drop_last: bool = False,
        layerwise_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.keep_rate = check_keep_rate(keep_rate)
        self.tradeoff = _check_tradeoff(tradeoff)
        self.class_head = bool(class_head)
        self.merger = check_early_merger(merger)
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
        if self.representative and merger is not None:
            raise SettingError(
                "representative=True and a merger are two ways to run for the waiting tokens;"
                " choose one"
            )

    def bind(self, vit: Any, patches: int) -> None:
        """Check the settings against the model; make the second classifier.

        Raises:
            ValueError: if layers or trade-offs do not fit its depth, no token would be updated, it
                does not pool over its patches, or has no class token for ``class_head``.
        """
        depth = len(vit.blocks)
        check_layers_exist(self.layers, depth)
        if isinstance(self.tradeoff, tuple) and len(self.tradeoff) != depth:
            raise SettingError(
                f"tradeoff needs one number per block, {depth} here, got {len(self.tradeoff)}"
            )
        if vit.global_pool == "token":
            raise SettingError(
                "Evo-ViT's head averages over the patches, but this model classifies by its class"
                " token; create the timm model with global_pool='avg'"
            )
        self._keep(patches)
        if self.class_head:
            self._make_class_head(vit)

    def _make_class_head(self, vit: Any) -> None:
        if getattr(vit, "cls_token", None) is None or not vit.num_classes:
            raise SettingError(
                "class_head=True needs a model with a class token and a classifier; use"
                " class_head=False"
            )
        width = vit.embed_dim
        device = next(vit.parameters()).device
        self.norm_cls = nn.LayerNorm(width, eps=1e-6, device=device)
        self.head_cls = _classifier(width, vit.num_classes, device)

    def reset_classifier(self, num_classes: int) -> None:
        """Give the class token's classifier as many classes."""
        if self.class_head:
            self.head_cls = _classifier(
                self.head_cls.in_features, num_classes, self.head_cls.weight.device
            )

    def begin(self, tokens: Tokens) -> Tokens:
        """No token ever stands for several patches for good, so sizes need not be followed."""
        return tokens.replace(size=None)

    def needs(self, index: int) -> frozenset[str]:
        """Importance in every block that a later selection looks back on."""
        if not self.layers:
            return frozenset()
        # Before the first selection all tokens are updated, so a trade-off of 1 forgets what was
        # before.
        forget = [block for block in range(self.layers[0]) if self._mix(block) == 1]
        looks_back = self.layerwise or index < self.layers[-1]
        return (
            frozenset({"importance"})
            if looks_back and index >= max(forget, default=0)
            else frozenset()
        )

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Select anew, in the selecting layers."""
        if not self._selects(index):
            return tokens
        return self._select(index, _rejoined(tokens))

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """Update the running attention of the tokens that are here."""
        if observed.importance is None:
            return tokens
        seen = observed.importance * observed.heads
        running = tokens.carry.get("attention")
        if running is not None:
            mix, here = self._mix(index), seen.shape[1]
            seen = torch.cat(((1 - mix) * running[:, :here] + mix * seen, running[:, here:]), dim=1)
        return tokens.carrying(attention=seen)

    def finish(self, tokens: Tokens) -> Tokens:
        """All come back; in training, also classify the class token."""
        tokens = _rejoined(tokens)
        if self.class_head and self.training:
            return tokens.carrying(class_logits=self.head_cls(self.norm_cls(tokens.x[:, 0])))
        return tokens

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """Half the task loss from the averaged patches and half from the class token, where it was
        classified.
        """
        terms = super().loss(output, target, criterion, teacher)
        second = output.carry.get("class_logits")
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
        before = tokens.carry["attention"]
        order = rank_order(before)
        x, running = gather_tokens(tokens.patches, order), before.gather(1, order)
        rank = inverse_order(order)
        last = not any(self._selects(later) for later in range(index + 1, tokens.depth))
        if self.drop_last and last:
            fate, role = torch.where(rank < keep, rank, -1), Role.DROPPED
        else:
            fate, role = rank, Role.PARKED
        reduction = Reduction(
            x[:, :keep], fate, torch.where(rank < keep, int(Role.KEPT), int(role))
        )
        tokens = tokens.reduced(index, reduction, before).carrying(attention=running)
        if role is Role.DROPPED:
            return tokens.carrying(attention=running[:, :keep])
        return self._represented(tokens.replace(parked=x[:, keep:]), running[:, keep:])

    def _represented(self, tokens: Tokens, attention: Tensor) -> Tokens:
        """Let a few tokens run for the parked ones, beside the prefix tokens."""
        assert tokens.parked is not None
        if self.merger is not None:
            merged = self.merger.represent(tokens.parked, attention)
            stand_in, group = merged.x, merged.assignment
        elif self.representative:
            group = torch.zeros_like(attention, dtype=torch.int64)
            stand_in = merge_groups(tokens.parked, group, group_weights(attention, group, 1), 1)
        else:
            return tokens
        x = torch.cat((tokens.x[:, : tokens.prefix], stand_in, tokens.patches), dim=1)
        tokens = tokens.carrying(stand_in=stand_in, stands_for=group)
        if self.merger is not None and self.merger.proportional_attention:
            members = torch.zeros_like(stand_in[..., 0]).scatter_add(
                1, group, torch.ones_like(attention, dtype=x.dtype)
            )
            bias = F.pad(members.log(), (tokens.prefix, tokens.count))
            tokens = tokens.replace(key_bias=bias[:, None, None, :])
        return tokens.replace(x=x, prefix=tokens.prefix + stand_in.shape[1])


def _rejoined(tokens: Tokens) -> Tokens:
    """Parked tokens behind the others again, changed as their stand-in was."""
    if tokens.parked is None:
        return tokens
    prefix, parked = tokens.prefix, tokens.parked
    start = tokens.carry.get("stand_in")
    if start is not None:
        prefix -= start.shape[1]
        change = tokens.x[:, prefix : tokens.prefix] - start
        parked = parked + gather_tokens(change, tokens.carry["stands_for"])
    x = torch.cat((tokens.x[:, :prefix], tokens.patches, parked), dim=1)
    carry = {
        name: value
        for name, value in tokens.carry.items()
        if name not in ("stand_in", "stands_for")
    }
    return tokens.replace(x=x, prefix=prefix, parked=None, key_bias=None, carry=carry)


def _classifier(width: int, classes: int, device: torch.device) -> nn.Linear:
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
