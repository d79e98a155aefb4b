"""``timm.models.vision_transformer``: DeiT, DINOv2, CLIP, SigLIP, AugReg and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.ops import linear_bias, linear_weight
from tdm_lightning.ops.linear import is_plain
from tdm_lightning.vit.adapters.attention import Heads, attended, seen_by
from tdm_lightning.vit.adapters.base import Read, nothing
from tdm_lightning.vit.adapters.parts import (
    ATTENTIONS,
    BLOCKS,
    AttentionParts,
    BlockParts,
    PreNorm,
    ResPost,
    run_attention,
)
from tdm_lightning.vit.adapters.registry import register_adapter
from tdm_lightning.vit.adapters.timm_base import TimmAdapter


class PlainAttention(AttentionParts):
    """``Attention``: one projection for queries, keys and values; norms and a gate if there are."""

    plain = True

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        qkv = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        k = attn.k_norm(k)
        return Heads(attn.q_norm(q), k, v, attn.scale, k)

    def asked(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`: no other queries are formed."""
        if not is_plain(attn.qkv):
            return super().asked(attn, h, rows, tokens, index)
        (q,) = _projected(attn, h[:, :rows], 0, 1)
        k, v = _projected(attn, h, 1, 3)
        k = attn.k_norm(k)
        return Heads(attn.q_norm(q), k, v, attn.scale, k)

    def queries_and_keys(self, attn: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`AttentionParts`."""
        q, k = _projected(attn, h, 0, 2)
        return attn.q_norm(q), attn.k_norm(k)

    def weighted(self, attn: Any, weights: Tensor, h: Tensor) -> Tensor:
        """See :class:`AttentionParts`."""
        (v,) = _projected(attn, h, 2, 3)
        return self.projected(attn, (attn.attn_drop(weights) @ v).transpose(1, 2).flatten(2), h)


def _projected(attn: Any, h: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Some of queries (0), keys (1) and values (2) of B×T×C, B×H×T×d each."""
    weight, bias = linear_weight(attn.qkv), linear_bias(attn.qkv)
    width = weight.shape[0] // 3
    part = slice(first * width, last * width)
    x = F.linear(h, weight[part], None if bias is None else bias[part])
    x = x.unflatten(-1, (last - first, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return x.unbind(0)


class DifferentialAttention(AttentionParts):
    """``DiffAttention``: two maps a head, one less a share of the other. Their mean is read."""

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`: 2·H queries and keys, H values."""
        q, k, v = attn.qkv(h).chunk(3, dim=2)
        return _differential_heads(attn, q, k, v)

    def output(
        self, attn: Any, heads: Heads, h: Tensor, bias: Tensor | None, policy: Tensor | None
    ) -> Tensor:
        """See :class:`AttentionParts`."""
        return attn.proj_drop(attn.proj(attn.norm(_difference(attn, heads, bias))))


def _differential_heads(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """Twice as many queries and keys as values, from B×T×C each."""
    q, k = (part.unflatten(-1, (2 * attn.num_heads, -1)).transpose(1, 2) for part in (q, k))
    v = v.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k = attn.k_norm(k)
    return Heads(attn.q_norm(q), k, v, attn.scale, k)


def _difference(attn: Any, heads: Heads, bias: Tensor | None) -> Tensor:
    """The first map of each head less a learned share of the second, B×T×C."""
    dropout = attn.attn_drop_p if attn.training else 0.0
    (q1, q2), (k1, k2) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (heads.q, heads.k))
    first, second = (
        F.scaled_dot_product_attention(q, k, heads.v, attn_mask=bias, dropout_p=dropout)
        for q, k in ((q1, k1), (q2, k2))
    )
    x = attn.sub_norm(first - attn._compute_lambda().type_as(heads.q) * second)
    return (x * (1 - attn.lambda_init)).transpose(1, 2).flatten(2)


class ParallelScaling(BlockParts):
    """``ParallelScalingBlock`` (ViT-22B): attention and MLP side by side from one projection, so
    reduction comes after the block.
    """

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """The block is its own attention."""
        return []

    def attend(
        self, block: Any, index: int, tokens: Tokens, needs: frozenset[str], rows: int | None
    ) -> tuple[Tensor, Read]:
        """Run the full block."""
        if tokens.policy is not None:
            raise UnsupportedModelError(
                f"training with a policy needs timm's Attention; {type(block).__name__} has its own"
            )
        bias = tokens.key_bias
        if rows is not None:
            return self.first_rows(block, tokens, rows), nothing
        if not needs:
            return block(tokens.x, **({} if bias is None else {"attn_mask": bias})), nothing
        hidden, q, k, v = self.projections(block, tokens.x)
        heads = self.heads(block, q, k, v)
        mixed = self.mixed(block, heads, bias)
        x = tokens.x + self.residual(block, mixed, hidden)

        def read() -> Any:
            normed = block.in_norm(x) if "normed" in needs else None
            return seen_by([heads], tokens, x, needs, bias, normed)

        return x, read

    def first_rows(self, block: Any, tokens: Tokens, rows: int) -> Tensor:
        """The first rows of the tokens after the block, B×rows×C."""
        hidden, q, k, v = self.projections(block, tokens.x)
        heads = self.heads(block, q[:, :rows], k, v)
        mixed = self.mixed(block, heads, tokens.key_bias)
        return tokens.x[:, :rows] + self.residual(block, mixed, hidden[:, :rows])

    def projections(self, block: Any, x: Tensor) -> tuple[Tensor, ...]:
        """The MLP's hidden units, queries, keys and values of B×T×C."""
        hidden, q, k, v = torch.split(block.in_proj(block.in_norm(x)), block.in_split, dim=-1)
        return (hidden if block.mlp_bias is None else hidden + block.mlp_bias), q, k, v

    def residual(self, block: Any, mixed: Tensor, hidden: Tensor) -> Tensor:
        """What attention and MLP add, B×T×C."""
        hidden = block.mlp_drop(block.mlp_act(hidden))
        return block.drop_path(block.ls(self.projected(block, mixed, hidden)))

    def heads(self, block: Any, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """Queries, keys and values, of B×T×C each."""
        q, k, v = (part.unflatten(-1, (-1, block.head_dim)) for part in (q, k, v))
        k = block.k_norm(k).transpose(1, 2)
        return Heads(block.q_norm(q).transpose(1, 2), k, v.transpose(1, 2), block.scale, k)

    def mixed(self, block: Any, heads: Heads, bias: Tensor | None) -> Tensor:
        """What the attention gives, B×T×C."""
        return attended(heads, bias, block.attn_drop.p if block.training else 0.0)

    def projected(self, block: Any, mixed: Tensor, hidden: Tensor) -> Tensor:
        """Attention and MLP together, B×T×C."""
        if block.out_proj is not None:
            return block.out_proj(torch.cat((mixed, hidden), dim=-1))
        return block.attn_out_proj(mixed) + block.mlp_out_proj(hidden)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


class DifferentialParallelScaling(ParallelScaling):
    """``DiffParallelScalingBlock``: the same with differential attention."""

    def heads(self, block: Any, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """See :class:`ParallelScaling`."""
        return _differential_heads(block, q, k, v)

    def mixed(self, block: Any, heads: Heads, bias: Tensor | None) -> Tensor:
        """See :class:`ParallelScaling`."""
        return _difference(block, heads, bias)

    def projected(self, block: Any, mixed: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`ParallelScaling`."""
        return block.out_proj(torch.cat((mixed, hidden), dim=-1))


class ParallelThings(BlockParts):
    """``ParallelThingsBlock``: several attentions side by side, then several MLPs."""

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """One for each branch."""
        return [branch.attn for branch in block.attns]

    def attend(
        self, block: Any, index: int, tokens: Tokens, needs: frozenset[str], rows: int | None
    ) -> tuple[Tensor, Read]:
        """See :class:`BlockParts`."""
        outputs, found = [], []
        for branch in block.attns:
            h = branch.norm(tokens.x)
            mixed, heads = run_attention(branch.attn, h, tokens, index, needs, rows)
            outputs.append(branch.drop_path(branch.ls(mixed)))
            found += [] if heads is None else [heads]
        x = tokens.x[:, :rows] + torch.stack(outputs).sum(dim=0)
        if not needs:
            return x, nothing

        def read() -> Any:
            normed = None
            if "normed" in needs:
                normed = torch.stack([branch.norm(x) for branch in block.ffns]).mean(0)
            return seen_by(found, tokens, x, needs, tokens.key_bias, normed)

        return x, read

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0)


ATTENTIONS |= {Attention: PlainAttention(), DiffAttention: DifferentialAttention()}
BLOCKS |= {
    Block: PreNorm(),
    ResPostBlock: ResPost(),
    ParallelScalingBlock: ParallelScaling(),
    DiffParallelScalingBlock: DifferentialParallelScaling(),
    ParallelThingsBlock: ParallelThings(),
}
register_adapter(VisionTransformer, TimmAdapter)
