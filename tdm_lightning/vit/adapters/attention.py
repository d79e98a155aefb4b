"""Attention from queries, keys and values that were computed once, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.ops import (
    biased_attention,
    class_importance,
    policy_softmax,
    received_attention,
)
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.ops.sums import membership


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one attention.

    Attributes:
        q: queries, B×H×T×d, normed and rotated as the attention has them; not scaled.
        k: keys, B×H×T×d, likewise.
        v: values, B×H×T×d.
        scale: factor on the products of queries and keys.
        content: keys before they were rotated by their positions, B×H×T×d.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    content: Tensor


def attended(
    heads: Heads, bias: Tensor | None, dropout: float = 0.0, policy: Tensor | None = None
) -> Tensor:
    """What attention makes of the values, B×T×(H·d).

    Args:
        heads: queries, keys and values.
        bias: added to the logits, broadcast to B×H×T×T.
        dropout: probability with which a weight is dropped, 0 at inference.
        policy: how far each token may be attended to, B×T; selects the explicit attention of
            :func:`~tdm_lightning.ops.policy_softmax`.
    """
    if policy is None and not dropout and bias is not None and bias.shape[1:3] == (1, 1):
        x = biased_attention(heads.q, heads.k, heads.v, bias, heads.scale)
    elif policy is None:
        x = F.scaled_dot_product_attention(
            heads.q, heads.k, heads.v, attn_mask=bias, dropout_p=dropout, scale=heads.scale
        )
    else:
        logits = (heads.q * heads.scale) @ heads.k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        weights = F.dropout(policy_softmax(logits, policy), dropout)
        x = weights.to(heads.v.dtype) @ heads.v
    return x.transpose(1, 2).flatten(2)


def attention_map(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The weights themselves, B×H×T×T, float32."""
    with full_precision(q.device):
        logits = (q.float() * scale) @ k.float().transpose(-2, -1)
        return (logits if bias is None else logits + bias).softmax(dim=-1)


def pooled_map(weights: Tensor, group: Tensor, share: Tensor, groups: int) -> Tensor:
    """The attention of merged tokens: what a group receives is the sum of its members', what it
    pays their mean by share.

    Args:
        weights: B×H×T×T.
        group: the group of each of T tokens in ``0…groups-1``, B×T, int64.
        share: of each token in its group, B×T.
        groups: number of groups.

    Returns:
        B×H×groups×groups.
    """
    batch, heads, t, _ = weights.shape
    if torch.compiler.is_exporting():  # see tdm_lightning.ops.sums
        of = membership(group, groups).to(weights.dtype).unsqueeze(1)
        return (of * share[:, None, None, :].to(of.dtype)) @ weights @ of.transpose(2, 3)
    columns = group[:, None, None, :].expand(batch, heads, t, t)
    received = weights.new_zeros(batch, heads, t, groups).scatter_add(3, columns, weights)
    rows = group[:, None, :, None].expand(batch, heads, t, groups)
    paid = received * share[:, None, :, None].to(received.dtype)
    return weights.new_zeros(batch, heads, groups, groups).scatter_add(2, rows, paid)


def seen_by(
    all_heads: list[Heads],
    tokens: Tokens,
    x: Tensor,
    needs: frozenset[str],
    bias: Tensor | None = None,
    normed: Tensor | None = None,
) -> Seen:
    """What attentions side by side (mostly one) tell of the patch tokens: their mean.

    Args:
        all_heads: of each attention.
        tokens: those that entered the block.
        x: all tokens after its attention, B×T×C.
        needs: see :meth:`tdm_lightning.Strategy.needs`.
        bias: what was added to the logits.
        normed: all tokens as the MLP sees them, B×T×C, where asked for.
    """
    prefix, rows = tokens.prefix, tokens.info.class_tokens
    importance = keys = None
    if "importance" in needs and rows:
        importance = _mean(
            [class_importance(one.q, one.k, one.scale, rows, bias)[:, prefix:] for one in all_heads]
        )
    elif needs & {"importance", "received"}:
        importance = _mean(
            [received_attention(one.q, one.k, one.scale, prefix, bias) for one in all_heads]
        )
    if "keys" in needs:
        keys = _mean([one.content.mean(dim=1)[:, prefix:] for one in all_heads])
    if normed is not None:
        normed = normed[:, prefix:]
    return Seen(x[:, prefix:], None, importance, keys, normed, prefix)


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)
