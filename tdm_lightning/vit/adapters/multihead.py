"""``torch.nn.MultiheadAttention``, which torchvision and open_clip take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.vit.adapters.attention import Heads
from tdm_lightning.vit.adapters.parts import ATTENTIONS, AttentionParts


class MultiheadAttention(AttentionParts):
    """torch's own attention, of queries, keys and values of one width."""

    plain = True
    native = False  # its fused form knows no bias of a key and shows no weights

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        q, k, v = _projected(attn, h, 0, 3)
        return Heads(q, k, v, self.scale(attn), k)

    def asked(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`: no other queries are formed."""
        (q,), (k, v) = _projected(attn, h[:, :rows], 0, 1), _projected(attn, h, 1, 3)
        return Heads(q, k, v, self.scale(attn), k)

    def queries_and_keys(self, attn: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`AttentionParts`."""
        q, k = _projected(attn, h, 0, 2)
        return q, k

    def weighted(self, attn: Any, weights: Tensor, h: Tensor) -> Tensor:
        """See :class:`AttentionParts`."""
        (v,) = _projected(attn, h, 2, 3)
        weights = F.dropout(weights, self.dropout(attn))
        return self.projected(attn, (weights @ v).transpose(1, 2).flatten(2), h)

    def scale(self, attn: Any) -> float:
        """See :class:`AttentionParts`."""
        return attn.head_dim**-0.5

    def dropout(self, attn: Any) -> float:
        """See :class:`AttentionParts`."""
        return attn.dropout if attn.training else 0.0

    def projected(self, attn: Any, x: Tensor, h: Tensor) -> Tensor:
        """See :class:`AttentionParts`."""
        return attn.out_proj(x)


def _projected(attn: Any, h: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Some of queries (0), keys (1) and values (2) of B×T×C, B×H×T×d each."""
    part, bias = slice(first * attn.embed_dim, last * attn.embed_dim), attn.in_proj_bias
    bias = None if bias is None else bias[part]
    x = F.linear(h, attn.in_proj_weight[part], bias)
    x = x.unflatten(-1, (last - first, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return x.unbind(0)


def check_multihead(attn: Any) -> None:
    """Raise ``TypeError`` for an attention that is more than one projection of its tokens."""
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        raise UnsupportedModelError(
            "its attention has projections or keys of its own beside the tokens'; plain"
            " nn.MultiheadAttention is taken"
        )
    if not attn.batch_first:
        raise UnsupportedModelError(
            "its attention takes tokens in front of images; make the model with batch_first=True"
        )


ATTENTIONS[nn.MultiheadAttention] = MultiheadAttention()
