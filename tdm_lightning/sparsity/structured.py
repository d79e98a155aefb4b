"""Whole heads and MLP units come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from tdm_lightning.core.checks import check_fraction
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.ops import linear_bias, linear_weight
from tdm_lightning.sparsity.base import Sparsity, gradient
from tdm_lightning.sparsity.exchange import exchange


class Structured(Sparsity):
    """Masks attention heads and MLP units: S²ViTE, which
    :func:`~tdm_lightning.sparsity.extract_dense` can make small.

    Each block keeps ``int(heads · H)`` heads and ``int(units · hidden)`` units: a head is its
    rows of ``attn.qkv``, a unit its row of ``mlp.fc1`` and its column of ``mlp.fc2``; biases and
    ``attn.proj`` stay whole. With O the heads' outputs before the projection and G the gradient
    there, heads leave by the smallest ``mean_b |Σ G·O|`` and come by the largest ``mean_b
    Σ|G|``; units leave by the ℓ1 norms of their row and column, and come by those of the
    gradients. Several processes take the sum.

    The official code differs in two points, without which hardly a unit would ever be exchanged:
    there what was removed competes for its own place, and what comes in is zero on both sides, a
    point with no gradient where it would stay. Here others take the place, so at most as many leave
    as there are others, and inactive parts try freshly initialised input rows (``fc1`` from the
    step that judges them, queries and keys when they come in); their output side starts at zero.

    Args:
        heads: share of each block's heads that is active, in (0, 1].
        units: share of each block's MLP units that is active, in (0, 1].

    Raises:
        TypeError, ValueError: if a share is no number or out of range.
    """

    def __init__(self, heads: float = 0.7, units: float = 0.7) -> None:
        super().__init__()
        self.heads = check_fraction(heads, "heads")
        self.units = check_fraction(units, "units")
        self._scores: dict[
            int, Tensor
        ] = {}  # block → worth and promise of its heads, 2×H, from one backward pass to the step

    def bind(self, vit: Any, generator: torch.Generator) -> None:
        """See :meth:`Sparsity.bind`.

        Raises:
            TypeError: if the model's blocks do not hold timm's plain attention and MLP.
            ValueError: if a density leaves no head or no unit.
        """
        for index, block in enumerate(getattr(vit, "blocks", [vit])):
            _check(block)
            weight = block.mlp.fc1.weight
            for name, share, size in (
                ("heads", self.heads, block.attn.num_heads),
                ("units", self.units, weight.shape[0]),
            ):
                count = int(size * share)
                if count < 1:
                    raise SettingError(
                        f"{name}={share} of {size} leaves no {name[:-1]} in a block; at least"
                        f" {1 / size:.3g} keeps one"
                    )
                self._hold(f"{name}_{index}", weight, (size,), count, generator)

    def active(self, index: int) -> tuple[Tensor, Tensor]:
        """Which heads, H, and which MLP units, bool, of block ``index`` are active."""
        return self.get_buffer(f"heads_{index}"), self.get_buffer(f"units_{index}")

    def fits(self, vit: Any) -> bool:
        """Whether the model has all the heads and units that there are masks for."""
        sizes = [(block.attn.num_heads, block.mlp.fc1.out_features) for block in vit.blocks]
        return sizes == [tuple(map(len, self.active(index))) for index in range(len(sizes))]

    def masked(self, vit: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """See :meth:`Sparsity.masked`."""
        for index, block in enumerate(vit.blocks):
            heads, units = self.active(index)
            yield (
                block.attn.qkv.weight,
                heads.repeat_interleave(block.attn.head_dim).repeat(3).unsqueeze(1),
            )
            yield block.mlp.fc1.weight, units.unsqueeze(1)
            yield block.mlp.fc2.weight, units.unsqueeze(0)

    @torch.no_grad()
    def adopt(self, vit: Any) -> None:
        """See :meth:`Sparsity.adopt`.

        Raises:
            ValueError: if a block has no head or no unit that is not zero.
        """
        for index, block in enumerate(vit.blocks):
            heads, units = self.active(index)
            found = (
                _rows(block).ne(0).any(dim=3).any(dim=2).any(dim=0),
                _norms(block.mlp.fc1.weight, block.mlp.fc2.weight) > 0,
            )
            if not all(mask.any() for mask in found):
                raise SettingError(
                    f"block {index} has no active head or no active unit: all of their weights are"
                    " zero"
                )
            heads.copy_(found[0])
            units.copy_(found[1])
        self.in_force.fill_(True)

    def correct(self, index: int, vit: Any, tokens: Tokens, seen: Seen) -> Seen:
        """See :meth:`Sparsity.correct`: without the masked heads, which look at all tokens alike
        and whose keys are a bias.
        """
        mask, _ = self.active(index)
        attn = vit.blocks[index].attn
        if attn.num_heads != len(mask):
            return seen  # they have been taken out
        active, importance, keys = mask.sum(), seen.importance, seen.keys
        if importance is not None:
            uniform: Any = 1 / (tokens.prefix + importance.shape[1])
            if tokens.key_bias is not None:
                uniform = tokens.key_bias.float().softmax(dim=-1)[:, 0, 0, tokens.prefix :]
            ours = (len(mask) * importance - (len(mask) - active) * uniform) / active
            importance = torch.where(self.in_force, ours.clamp(min=0), importance)
        if keys is not None:
            idle = _idle_keys(attn)[~mask].sum(dim=0)
            keys = torch.where(self.in_force, (len(mask) * keys - idle) / active, keys)
        return dataclasses.replace(seen, importance=importance, keys=keys)

    @torch.no_grad()
    def probe(self, vit: Any, generator: torch.Generator) -> None:
        """See :meth:`Sparsity.probe`: fresh rows of ``mlp.fc1``; behind them the columns of
        ``mlp.fc2`` are zero.
        """
        for index, block in enumerate(vit.blocks):
            _renew(block.mlp.fc1.weight, ~self.active(index)[1], generator)

    def watch(self, vit: Any) -> list[RemovableHandle]:
        """See :meth:`Sparsity.watch`."""
        return [
            block.attn.proj.register_forward_pre_hook(
                partial(self._see, index, block.attn.num_heads)
            )
            for index, block in enumerate(vit.blocks)
        ]

    def _see(self, index: int, heads: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        attended = inputs[0]
        if (
            attended.requires_grad
        ):  # the hook goes with the graph; detached, or the two would hold each other
            attended.register_hook(partial(self._score, index, heads, attended.detach()))

    def _score(self, index: int, heads: int, attended: Tensor, grad: Tensor) -> None:
        o, g = (x.float().unflatten(-1, (heads, -1)) for x in (attended, grad))
        score = torch.stack(((g * o).sum(dim=(1, 3)).abs().sum(dim=0), g.abs().sum(dim=(0, 1, 3))))
        self._scores[index] = (
            self._scores[index] + score if index in self._scores else score
        )  # accumulated gradients

    @torch.no_grad()
    def exchange(self, vit: Any, rate: float, generator: torch.Generator) -> None:
        """See :meth:`Sparsity.exchange`.

        Raises:
            ValueError: if no training pass was watched, or a gradient is missing.
        """
        self.probe(vit, generator)  # as they were when they were judged
        for index, block in enumerate(vit.blocks):
            for rows in _rows(block)[:2]:
                _renew(rows, ~self.active(index)[0], generator)
        scores, self._scores = self._scores, {}
        for index, block in enumerate(vit.blocks):
            if index not in scores:
                raise SettingError(
                    "an exchange of heads goes by a training pass that was watched: call"
                    " on_progress() before each training step and after_optimizer_step() behind it,"
                    " with the same count of steps"
                )
            heads, units = self.active(index)
            fc1, fc2 = block.mlp.fc1.weight, block.mlp.fc2.weight
            growth = _norms(gradient(fc1, "mlp.fc1.weight"), gradient(fc2, "mlp.fc2.weight"))
            worth, promise = _summed(scores[index])
            heads.copy_(exchange(heads, worth, promise, rate))
            units.copy_(exchange(units, _norms(fc1, fc2), growth, rate))


def _rows(block: Any) -> Tensor:
    """Queries', keys' and values' weights by head, a view, 3×H×d×C."""
    return block.attn.qkv.weight.view(3, block.attn.num_heads, block.attn.head_dim, -1)


def _idle_keys(attn: Any) -> Tensor:
    """The keys of heads without weights, H×d."""
    bias = linear_bias(attn.qkv)
    if bias is None:
        bias = linear_weight(attn.qkv).new_zeros(3 * attn.attn_dim)
    return attn.k_norm(bias.view(3, attn.num_heads, -1)[1])


def _norms(fc1: Tensor, fc2: Tensor) -> Tensor:
    """ℓ1 norms of the units' rows and columns together."""
    return fc1.abs().sum(dim=1) + fc2.abs().sum(dim=0)


def _renew(rows: Tensor, which: Tensor, generator: torch.Generator) -> None:
    """Start some rows afresh, as timm initialises a ViT's; drawn on the CPU, so that all processes
    have the same.
    """
    fresh = torch.empty(int(which.sum()), *rows.shape[1:])
    rows[which] = nn.init.trunc_normal_(fresh, std=0.02, generator=generator).to(rows)


def _summed(scores: Tensor) -> Tensor:
    """The sum over all processes: each has seen its own images, and all must decide alike."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(scores)
    return scores


def _check(block: Any) -> None:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    plain = type(attn) is Attention and type(mlp) is Mlp
    # With a gate or a norm between the layers, taking parts out would make another function of the
    # model.
    inner = [getattr(attn, "gate", None), getattr(attn, "norm", None), getattr(mlp, "norm", None)]
    if not plain or any(part is not None and type(part) is not nn.Identity for part in inner):
        raise SettingTypeError(
            "Structured sparsity needs blocks with timm's plain Attention and Mlp, and this"
            f" model's {type(block).__name__} holds {type(attn).__name__} and {type(mlp).__name__},"
            " or a gate or norm between their layers; take another model, or Unstructured"
        )
