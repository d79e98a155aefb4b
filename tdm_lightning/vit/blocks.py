"""One small adapter per timm block family: run its attention half, observe it, run its MLP half.

An adapter calls the block's own modules and never re-implements their arithmetic, so LayerScale, drop-path, QK norm, gates
and inner norms stay timm's. Calling a block's parts fires no forward hook on the block; ``TokenReducedViT.taps`` stands in
for those.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, DiffAttention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.ops import QueryKey, class_row, mean_keys, policy_softmax, received_attention
from tdm_lightning.tokens import Observed, Tokens


class UnsupportedBlock(TypeError):
    """A block that no adapter can split; says why."""


def _norm(module: nn.Module) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


def _query_key(attn: Any) -> QueryKey:
    """The query and key projections of a timm ``Attention``."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    width = weight.shape[0] // 3
    heads = attn.num_heads
    if isinstance(attn, DiffAttention):
        heads *= 2  # two maps a head; their mean stands for the head
    return QueryKey(
        weight[:width],
        None if bias is None else bias[:width],
        weight[width : 2 * width],
        None if bias is None else bias[width : 2 * width],
        heads,
        attn.scale,
        _norm(attn.q_norm),
        _norm(attn.k_norm),
    )


def _bias(tokens: Tokens) -> dict[str, Any]:
    return {} if tokens.key_bias is None else {"attn_mask": tokens.key_bias}


def _attention(attn: Any, h: Tensor, tokens: Tokens) -> Tensor:
    """Attention as timm has it, or, under a policy, its explicit form; input and output B×T×C."""
    if tokens.queries is not None:
        return _attention_of_rows(attn, h, tokens.queries, tokens)
    if tokens.policy is None:
        return attn(h, **_bias(tokens))
    if type(attn) is not Attention:
        raise UnsupportedBlock(
            f"training with a policy masks the attention weights one by one, which timm's Attention allows and this model's "
            f"{type(attn).__name__} does not; take a model with plain attention, or a strategy without a policy (EViT, TDM)"
        )
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)
    if tokens.key_bias is not None:
        logits = logits + tokens.key_bias
    weights = attn.attn_drop(policy_softmax(logits, tokens.policy)).to(v.dtype)
    x = attn.norm((weights @ v).transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        x = x * gate(h).sigmoid()
    return attn.proj_drop(attn.proj(x))


def _attention_of_rows(attn: Any, h: Tensor, rows: Tensor, tokens: Tokens) -> Tensor:
    """Timm's attention for some rows of B×T×C, which look at all of them; B×Q×C."""
    if type(attn) is not Attention:
        raise UnsupportedBlock(
            f"computing some rows only needs timm's Attention, and this model has {type(attn).__name__}; take a model with "
            f"plain attention, or another strategy"
        )
    asking = h.index_select(1, rows)
    width = attn.qkv.weight.shape[0] // 3
    bias = (None, None) if attn.qkv.bias is None else (attn.qkv.bias[:width], attn.qkv.bias[width:])
    q = F.linear(asking, attn.qkv.weight[:width], bias[0]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = F.linear(h, attn.qkv.weight[width:], bias[1]).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    drop = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(
        attn.q_norm(q), attn.k_norm(k), v, attn_mask=tokens.key_bias, dropout_p=drop, scale=attn.scale
    )
    x = attn.norm(x.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        x = x * gate(asking).sigmoid()
    return attn.proj_drop(attn.proj(x))


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


class BlockAdapter:
    """Splits one timm block into attention and MLP. ``class_rows`` leading tokens stand for the class (0: none)."""

    #: Whether :meth:`attend` heeds ``tokens.queries``.
    selects_rows: bool = False

    def __init__(self, class_rows: int) -> None:
        self.class_rows = class_rows

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """The tokens after the attention residual, B×T×C, and the inputs of the block's attentions, each B×T×C."""
        raise TypeError(f"{type(self).__name__} must override attend()")

    def projections(self, block: Any) -> list[QueryKey]:
        """The query and key projections of the block's attentions."""
        return [_query_key(block.attn)]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """The tokens after attention as the MLP sees them, B×T×C."""
        return block.norm2(x)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """The tokens after the MLP residual, B×T×C."""
        raise TypeError(f"{type(self).__name__} must override feed_forward()")

    def observe(self, block: Any, tokens: Tokens, inputs: list[Tensor], x: Tensor, needs: frozenset[str]) -> Observed:
        """What a strategy asked to see; with several attentions in parallel, their mean.

        Args:
            block: the timm block.
            tokens: the tokens that entered it.
            inputs: the inputs of its attentions.
            x: the tokens after attention.
            needs: see :meth:`Strategy.needs`.
        """
        seen = list(zip(inputs, self.projections(block), strict=True))
        importance = keys = normed = None
        if "importance" in needs:
            importance = _mean([self._importance(h, qk, tokens) for h, qk in seen])
        if "keys" in needs:
            keys = _mean([mean_keys(h, qk) for h, qk in seen])
        if "normed" in needs:
            normed = self.normed(block, x)
        return Observed(importance, seen[0][1].heads, keys, normed)

    def _importance(self, h: Tensor, qk: QueryKey, tokens: Tokens) -> Tensor:
        if self.class_rows:
            row = class_row(h, qk, self.class_rows, tokens.key_bias)
            return row.mean(dim=(1, 2))[:, tokens.prefix :]
        return received_attention(h, qk, tokens.prefix, tokens.key_bias)


class PreNorm(BlockAdapter):
    """``Block``: norm → attention → residual, norm → MLP → residual."""

    selects_rows = True

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        h = block.norm1(tokens.x)
        x = tokens.x if tokens.queries is None else tokens.x.index_select(1, tokens.queries)
        return x + block.drop_path1(block.ls1(_attention(block.attn, h, tokens))), [h]

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class ResPost(BlockAdapter):
    """``ResPostBlock``: attention → norm → residual, MLP → norm → residual."""

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        return tokens.x + block.drop_path1(block.norm1(_attention(block.attn, tokens.x, tokens))), [tokens.x]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """No norm stands before this MLP."""
        return x

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + block.drop_path2(block.norm2(block.mlp(x)))


class ParallelScaling(BlockAdapter):
    """``ParallelScalingBlock`` (ViT-22B): attention and MLP side by side, so reduction comes after the block."""

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """Run the whole block; its attention's input is formed again only where :meth:`observe` wants it."""
        if tokens.policy is not None:
            raise UnsupportedBlock(f"training with a policy needs timm's Attention; {type(block).__name__} has its own")
        return block(tokens.x, **_bias(tokens)), []

    def observe(self, block: Any, tokens: Tokens, inputs: list[Tensor], x: Tensor, needs: frozenset[str]) -> Observed:
        """See :meth:`BlockAdapter.observe`."""
        return super().observe(block, tokens, [block.in_norm(tokens.x)], x, needs)

    def projections(self, block: Any) -> list[QueryKey]:
        """Slices of the joint input projection."""
        hidden, width = block.in_split[0], block.in_split[1]
        weight, bias = block.in_proj.weight, block.in_proj.bias
        q, k = slice(hidden, hidden + width), slice(hidden + width, hidden + 2 * width)
        heads = width // block.head_dim
        q_bias, k_bias = (None, None) if bias is None else (bias[q], bias[k])
        return [QueryKey(weight[q], q_bias, weight[k], k_bias, heads, block.scale, _norm(block.q_norm), _norm(block.k_norm))]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """The block has one norm for both halves."""
        return block.in_norm(x)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


class ParallelThings(BlockAdapter):
    """``ParallelThingsBlock``: several attentions side by side, then several MLPs."""

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        inputs = [branch.norm(tokens.x) for branch in block.attns]
        outputs = [
            branch.drop_path(branch.ls(_attention(branch.attn, h, tokens)))
            for branch, h in zip(block.attns, inputs, strict=True)
        ]
        return tokens.x + torch.stack(outputs).sum(dim=0), inputs

    def projections(self, block: Any) -> list[QueryKey]:
        """One for each branch."""
        return [_query_key(branch.attn) for branch in block.attns]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """The mean over the branches' norms."""
        return torch.stack([branch.norm(x) for branch in block.ffns]).mean(0)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0)


_ADAPTERS: dict[type[nn.Module], type[BlockAdapter]] = {
    timm_vit.Block: PreNorm,
    timm_vit.ResPostBlock: ResPost,
    timm_vit.ParallelScalingBlock: ParallelScaling,
    timm_vit.DiffParallelScalingBlock: ParallelScaling,
    timm_vit.ParallelThingsBlock: ParallelThings,
}


def adapter_for(block: Any, class_rows: int) -> BlockAdapter:
    """The adapter of a block's family.

    Raises:
        UnsupportedBlock: if there is none, or the block holds an attention that cannot be observed.
    """
    adapter = _ADAPTERS.get(type(block))
    if adapter is None:
        known = ", ".join(cls.__name__ for cls in _ADAPTERS)
        raise UnsupportedBlock(f"its blocks are {type(block).__module__}.{type(block).__name__}; supported are {known}")
    for module in [getattr(block, "attn", None), *(branch.attn for branch in getattr(block, "attns", ()))]:
        if module is not None and not isinstance(module, (Attention, DiffAttention)):
            raise UnsupportedBlock(f"its attention is {type(module).__name__}; supported are Attention and DiffAttention")
    return adapter(class_rows)
