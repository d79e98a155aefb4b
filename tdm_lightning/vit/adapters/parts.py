"""Blocks taken apart into attention and MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.ops.kernels import current
from tdm_lightning.strategies.base import Ahead, Requirements
from tdm_lightning.vit.adapters.attention import Heads, attended, attention_map, pooled_map, seen_by
from tdm_lightning.vit.adapters.base import Adapter, Read, nothing


class AttentionParts(ABC):
    """An attention class, taken apart."""

    #: Whether it follows a policy, and its weights may be formed apart from its values.
    plain: bool = False
    #: Whether timm's own forward pass can be used where nothing is to be read: not where it always
    #: takes the positions of the full grid.
    native: bool = True

    @abstractmethod
    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """Queries, keys and values of the attention's input, B×T×C."""

    def run(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Tensor:
        """The attention as timm has it, B×T×C."""
        return attn(h, **({} if tokens.key_bias is None else {"attn_mask": tokens.key_bias}))

    def bias(self, attn: Any, tokens: Tokens) -> Tensor | None:
        """What is added to the logits, broadcast to B×H×T×T."""
        return tokens.key_bias

    def output(
        self, attn: Any, heads: Heads, h: Tensor, bias: Tensor | None, policy: Tensor | None
    ) -> Tensor:
        """What comes behind queries, keys and values: softmax, norm, gate, projection; B×T×C."""
        return self.projected(attn, attended(heads, bias, self.dropout(attn), policy), h)

    def scale(self, attn: Any) -> float:
        """Factor on the products of queries and keys."""
        return attn.scale

    def dropout(self, attn: Any) -> float:
        """Probability with which a weight is dropped."""
        return attn.attn_drop.p if attn.training else 0.0

    def projected(self, attn: Any, x: Tensor, h: Tensor) -> Tensor:
        """What comes behind the weighted values, B×T×C: norm, gate, projection."""
        if hasattr(attn, "norm"):
            x = attn.norm(x)
        if getattr(attn, "gate", None) is not None:
            x = x * attn.gate(h).sigmoid()
        return attn.proj_drop(attn.proj(x))

    def queries_and_keys(self, attn: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        """Those of B×T×C, B×H×T×d each, without values."""
        raise UnsupportedModelError(f"{type(attn).__name__} forms no queries without values")

    def weighted(self, attn: Any, weights: Tensor, h: Tensor) -> Tensor:
        """What an attention map, B×H×T×T, makes of the values of B×T×C, projected."""
        raise UnsupportedModelError(f"{type(attn).__name__} forms no values alone")

    def of_rows(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Tensor:
        """The attention of the first rows of B×T×C, which look at all of them; B×rows×C."""
        heads, bias = self.asked(attn, h, rows, tokens, index), self.bias(attn, tokens)
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., :rows, :]
        return self.output(attn, heads, h[:, :rows], bias, None)

    def asked(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Heads:
        """Queries of the first rows, keys and values of all."""
        heads = self.heads(attn, h, tokens, index)
        return replace(heads, q=heads.q[:, :, :rows])


class BlockParts(ABC):
    """A block class, taken apart into attention and MLP.

    Attributes:
        plain: whether the block is one attention behind a norm, then one MLP behind a norm.
    """

    plain: bool = False

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """The attentions of the block, side by side."""
        return [block.attn]

    @abstractmethod
    def attend(
        self, block: Any, index: int, tokens: Tokens, needs: frozenset[str], rows: int | None
    ) -> tuple[Tensor, Read]:
        """See :meth:`Adapter.attend`."""

    def attend_ahead(self, block: Any, tokens: Tokens, reduce: Callable[[Tensor], Ahead]) -> Tokens:
        """See :meth:`Adapter.attend_ahead`."""
        raise UnsupportedModelError(f"{type(block).__name__} computes its attention in one piece")

    @abstractmethod
    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.feed_forward`."""


#: The attention and block classes that are known; each file of this folder adds its module's. A
#: subclass may do anything in its forward pass, so only these very classes count.
ATTENTIONS: dict[type[nn.Module], AttentionParts] = {}
BLOCKS: dict[type[nn.Module], BlockParts] = {}
Parts = TypeVar("Parts", AttentionParts, BlockParts)


def parts_of(module: nn.Module, known: dict[type[nn.Module], Parts]) -> Parts:
    """What takes a module apart that was checked when the strategy was attached.

    By then it was of a known class; sharding may have put a class of its own over that since.
    """
    return next(known[kind] for kind in type(module).__mro__ if kind in known)


class PartsAdapter(Adapter):
    """An adapter of models whose blocks are of the classes in :data:`BLOCKS`."""

    takes_rows = True

    def check(self, vit: Any, requirements: Requirements) -> None:
        """See :meth:`Adapter.check`."""
        for block in self.blocks(vit):
            check_block(block)
            if requirements.rows or requirements.ahead:
                check_plain(block)

    def attend(
        self,
        block: Any,
        index: int,
        tokens: Tokens,
        needs: frozenset[str],
        rows: int | None = None,
    ) -> tuple[Tensor, Read]:
        """See :meth:`Adapter.attend`."""
        return parts_of(block, BLOCKS).attend(block, index, tokens, needs, rows)

    def attend_ahead(self, block: Any, tokens: Tokens, reduce: Callable[[Tensor], Ahead]) -> Tokens:
        """See :meth:`Adapter.attend_ahead`."""
        return parts_of(block, BLOCKS).attend_ahead(block, tokens, reduce)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.feed_forward`."""
        return parts_of(block, BLOCKS).feed_forward(block, x)


def run_attention(
    attn: nn.Module,
    h: Tensor,
    tokens: Tokens,
    index: int,
    needs: frozenset[str],
    rows: int | None = None,
) -> tuple[Tensor, Heads | None]:
    """One attention on its input, B×T×C; and its heads, where something is to be read from them."""
    parts = parts_of(attn, ATTENTIONS)
    if tokens.policy is not None and not parts.plain:
        raise UnsupportedModelError(
            "training with a policy needs timm's Attention, and this model has"
            f" {type(attn).__name__}; take a model with plain attention, or a strategy that needs"
            " none (EViT, TDM)"
        )
    if rows is not None:
        return parts.of_rows(attn, h, rows, tokens, index), None
    # timm's forward pass knows nothing of the kernel for a bias
    own = tokens.policy is not None or (tokens.key_bias is not None and current() == "triton")
    if parts.native and not own and not needs & {"importance", "received", "keys"}:
        return parts.run(attn, h, tokens, index), None
    heads = parts.heads(attn, h, tokens, index)
    return parts.output(attn, heads, h, parts.bias(attn, tokens), tokens.policy), heads


class PreNorm(BlockParts):
    """Norm → attention → residual, norm → MLP → residual."""

    plain = True

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """What attention and MLP see the tokens through."""
        return block.norm1, block.norm2

    def attend(
        self, block: Any, index: int, tokens: Tokens, needs: frozenset[str], rows: int | None
    ) -> tuple[Tensor, Read]:
        """See :meth:`Adapter.attend`."""
        (attn,), (first, second) = self.attentions(block), self.norms(block)
        mixed, heads = run_attention(attn, first(tokens.x), tokens, index, needs, rows)
        x = tokens.x[:, :rows] + self.residual(block, mixed)
        return x, reader(attn, heads, tokens, x, needs, second)

    def attend_ahead(self, block: Any, tokens: Tokens, reduce: Callable[[Tensor], Ahead]) -> Tokens:
        """See :meth:`Adapter.attend_ahead`."""
        (attn,), (norm, _), prefix = self.attentions(block), self.norms(block), tokens.prefix
        parts = parts_of(attn, ATTENTIONS)
        q, k = parts.queries_and_keys(attn, norm(tokens.x))
        weights = attention_map(q, k, parts.scale(attn), parts.bias(attn, tokens))
        found = reduce(weights.mean(dim=(1, 2)))
        first = torch.arange(prefix, device=found.group.device).expand(found.group.shape[0], -1)
        group = torch.cat((first, found.group + prefix), dim=1)
        share = pad(found.weight, (prefix, 0), value=1.0)
        x = found.tokens.x
        pooled = pooled_map(weights, group, share, x.shape[1])
        mixed = parts.weighted(attn, pooled.to(x.dtype), norm(x))
        return found.tokens.replace(x=x + self.residual(block, mixed))

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """What the attention adds."""
        return block.drop_path1(block.ls1(mixed))

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.feed_forward`."""
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class PreNormGamma(PreNorm):
    """As :class:`PreNorm`, with layer scales that are the block's own or missing."""

    plain = False

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """What the attention adds."""
        return block.drop_path1(_scaled(mixed, block.gamma_1))

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.feed_forward`."""
        return x + block.drop_path2(_scaled(block.mlp(block.norm2(x)), block.gamma_2))


class ResPost(BlockParts):
    """Attention → norm → residual, MLP → norm → residual."""

    def attend(
        self, block: Any, index: int, tokens: Tokens, needs: frozenset[str], rows: int | None
    ) -> tuple[Tensor, Read]:
        """See :meth:`Adapter.attend`."""
        mixed, heads = run_attention(block.attn, tokens.x, tokens, index, needs, rows)
        x = tokens.x[:, :rows] + block.drop_path1(block.norm1(mixed))
        return x, reader(block.attn, heads, tokens, x, needs, nn.Identity())  # no norm is before

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.feed_forward`."""
        return x + block.drop_path2(block.norm2(block.mlp(x)))


def reader(
    attn: nn.Module,
    heads: Heads | None,
    tokens: Tokens,
    x: Tensor,
    needs: frozenset[str],
    norm: Any,
) -> Read:
    """Reads from an attention's heads what is needed.

    Args:
        attn: the attention.
        heads: its queries, keys and values.
        tokens: those that entered the block.
        x: all tokens after attention, B×T×C.
        needs: what to read.
        norm: what the MLP sees the tokens through.
    """
    if not needs:
        return nothing
    found = [] if heads is None else [heads]

    def read() -> Any:
        bias = parts_of(attn, ATTENTIONS).bias(attn, tokens)
        normed = norm(x) if "normed" in needs else None
        return seen_by(found, tokens, x, needs, bias, normed)

    return read


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def check_block(block: nn.Module) -> None:
    """Raise ``TypeError`` for a block or an attention of another class than those known."""
    parts = BLOCKS.get(type(block))
    if parts is None:
        known = ", ".join(cls.__name__ for cls in BLOCKS)
        raise UnsupportedModelError(
            f"its blocks are {type(block).__module__}.{type(block).__name__}; supported are {known}"
        )
    for attention in parts.attentions(block):
        if type(attention) not in ATTENTIONS:
            known = ", ".join(cls.__name__ for cls in ATTENTIONS)
            raise UnsupportedModelError(
                f"its attention is {type(attention).__name__}; supported are {known}"
            )


def check_plain(block: nn.Module) -> None:
    """Raise ``TypeError`` for a block that is more than attention and MLP, one after the other, or
    whose attention is not plain.
    """
    parts = BLOCKS[type(block)]
    attentions = parts.attentions(block)
    plain = all(ATTENTIONS[type(attention)].plain for attention in attentions)
    if plain and parts.plain:
        return
    inner = "".join(f" with {type(attention).__name__}" for attention in attentions[:1])
    raise UnsupportedModelError(
        "chosen rows of a block or its attention map are computed, which takes timm's Block with"
        " its Attention, or torchvision's; this model's is"
        f" {type(block).__name__}{inner}. Take a model with plain blocks, or another strategy such"
        " as EViT or TDM"
    )
