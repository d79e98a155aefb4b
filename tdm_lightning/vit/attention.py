"""Timm's attention modules, taken apart as far as token reduction needs it."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, DiffAttention
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.ops import QueryKey, linear_bias, linear_weight, policy_softmax
from tdm_lightning.ops.linear import is_quantized

#: Attentions with rotary positions, and attentions with a relative position bias.
ROTARY = (EvaAttention, AttentionRope)
BIASED = (BeitAttention, RelPosAttention)
KNOWN = (Attention, DiffAttention, *ROTARY, *BIASED)


class UnsupportedBlock(UnsupportedModelError):
    """A block that no adapter can split; says why."""


def query_key(attn: Any, rope: Tensor | None = None) -> QueryKey:
    """The query and key projections of a timm attention.

    Args:
        attn: one of :data:`KNOWN`.
        rope: rotation of the tokens' queries and keys, broadcast to B×H×N×D.
    """
    (q_weight, k_weight), (q_bias, k_bias) = _weights(attn), _biases(attn)
    heads = attn.num_heads
    if isinstance(attn, DiffAttention):
        heads *= 2  # two maps a head; their mean stands for the head
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:  # several heads share a key
        k_weight = _repeated(k_weight, groups, heads)
        k_bias = None if k_bias is None else _repeated(k_bias, groups, heads)
    half = getattr(attn, "rotate_half", False)
    return QueryKey(
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        heads,
        attn.scale,
        norm_or_none(getattr(attn, "q_norm", None)),
        norm_or_none(getattr(attn, "k_norm", None)),
        None if rope is None else lambda x: apply_rot_embed_cat(x, rope, half=half).type_as(x),
        getattr(attn, "num_prefix_tokens", 0),
    )


def norm_or_none(module: nn.Module | None) -> nn.Module | None:
    """The module, or ``None`` for one that does nothing."""
    return None if isinstance(module, nn.Identity) else module


def _weights(attn: Any) -> tuple[Tensor, Tensor]:
    if attn.qkv is None:
        return linear_weight(attn.q_proj), linear_weight(attn.k_proj)
    q, k, _ = linear_weight(attn.qkv).chunk(3)
    return q, k


def _biases(attn: Any) -> tuple[Tensor | None, Tensor | None]:
    if attn.qkv is None:
        return linear_bias(attn.q_proj), linear_bias(attn.k_proj)
    if getattr(attn, "q_bias", None) is not None:
        return attn.q_bias, attn.k_bias
    bias = linear_bias(attn.qkv)
    if bias is None:
        return None, None
    q, k, _ = bias.chunk(3)
    return q, k


def _repeated(rows: Tensor, groups: int, heads: int) -> Tensor:
    """Every key head's rows, once for each head that reads them."""
    return rows.unflatten(0, (heads // groups, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)


def full_attention(attn: Any, h: Tensor, tokens: Tokens) -> Tensor:
    """Attention as timm has it, or, under a policy or for chosen rows, its explicit form; from
    B×T×C to B×T×C or B×Q×C.
    """
    if tokens.queries is not None:
        _require_plain(attn, "computing some rows only")
        return _attention_of_rows(attn, h, tokens.queries, tokens)
    if tokens.policy is None:
        return attn(h, **({} if tokens.key_bias is None else {"attn_mask": tokens.key_bias}))
    _require_plain(attn, "training with a policy, which masks the attention weights one by one,")
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)
    if tokens.key_bias is not None:
        logits = logits + tokens.key_bias
    weights = attn.attn_drop(policy_softmax(logits, tokens.policy)).to(v.dtype)
    return _projected(attn, weights @ v, h)


def rotary_attention(attn: Any, h: Tensor, tokens: Tokens, rope: Tensor | None) -> Tensor:
    """Attention with rotary positions, as timm has it; B×T×C."""
    if tokens.policy is not None or tokens.queries is not None:
        _require_plain(attn, "a policy or a choice of rows")
    if (
        getattr(attn, "q_bias", None) is not None
        and not attn.qkv_bias_separate
        and is_quantized(attn.qkv)
    ):
        raise UnsupportedBlock(
            f"timm's {type(attn).__name__} multiplies by the weight of its qkv layer, which a"
            " quantised layer keeps packed; leave the qkv layers as they are, by naming the layers"
            " to quantise, or set qkv_bias_separate of every attention"
        )
    return attn(h, rope=rope, attn_mask=tokens.key_bias)


def biased_attention(attn: Any, h: Tensor, tokens: Tokens, bias: Tensor | None) -> Tensor:
    """Attention with a bias for each pair of tokens, broadcast to B×H×T×T; B×T×C.

    Timm's modules always take the bias of the whole grid, so their parts are run here.
    """
    if tokens.policy is not None or tokens.queries is not None:
        _require_plain(attn, "a policy or a choice of rows")
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(h)
    else:
        qkv = F.linear(
            h, linear_weight(attn.qkv), torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        )
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q_norm, k_norm = (
        norm_or_none(getattr(attn, "q_norm", None)),
        norm_or_none(getattr(attn, "k_norm", None)),
    )
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    drop = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=attn.scale)
    return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))


def own_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """The relative position bias of an attention on the whole grid, 1×H×T0×T0, the model's
    shared one included.
    """
    if isinstance(attn, BeitAttention):
        if attn.relative_position_bias_table is None:
            return shared
        return attn._get_rel_pos_bias() if shared is None else attn._get_rel_pos_bias() + shared
    return shared if attn.rel_pos is None else attn.rel_pos.get_bias()


def _require_plain(attn: nn.Module, what: str) -> None:
    if type(attn) is not Attention:
        raise UnsupportedBlock(
            f"{what} needs timm's Attention, and this model has {type(attn).__name__}; take a model"
            " with plain attention, or a strategy that needs neither policy nor chosen rows (EViT,"
            " TDM)"
        )


def _attention_of_rows(attn: Any, h: Tensor, rows: Tensor, tokens: Tokens) -> Tensor:
    """Timm's attention for some rows of B×T×C, which look at all of them; B×Q×C."""
    asking = h.index_select(1, rows)
    weight, bias = linear_weight(attn.qkv), linear_bias(attn.qkv)
    width = weight.shape[0] // 3
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    q = F.linear(asking, weight[:width], q_bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = (
        F.linear(h, weight[width:], kv_bias)
        .unflatten(-1, (2, attn.num_heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    drop = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(
        attn.q_norm(q),
        attn.k_norm(k),
        v,
        attn_mask=tokens.key_bias,
        dropout_p=drop,
        scale=attn.scale,
    )
    return _projected(attn, x, asking)


def _projected(attn: Any, x: Tensor, asking: Tensor) -> Tensor:
    """What timm's Attention does behind its softmax: norm, gate and output projection of
    B×H×T×d.
    """
    x = attn.norm(x.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        x = x * gate(asking).sigmoid()
    return attn.proj_drop(attn.proj(x))
