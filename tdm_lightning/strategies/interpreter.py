"""The network with which IA-RED² asks the class token what each patch is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.ops import linear_bias, linear_weight
from tdm_lightning.ops.precision import full_precision

#: Logit of every score before training: all patches stay at a threshold of 0.5, and a sample drops
#: about a quarter.
_START = 1.0


class MultiHeadInterpreter(nn.Module):
    """How probably each patch token should stay (Pan et al., IA-RED², 2021, §3.2): ``mean_h
    sigmoid(q_cls·k_j/√d)``.

    Parameter names and shapes are those of the published weights (``groups.{g}.agent.…``), whose
    projection also has rows for values; scores use two thirds of it. The keys are never formed:
    ``q·(W_k x + b_k) = (qᵀW_k)·x + q·b_k``, which costs ``2C² + H·N·C``
    multiply-accumulates an image instead of ``C² + N·C²``.

    Args:
        width: C of the tokens; DeiT-S (384) makes 443,520 parameters.
        heads: H, a divisor of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(width, 3 * width)
        nn.init.trunc_normal_(self.qk.weight, std=0.02)
        nn.init.constant_(self.qk.bias, (_START / (width / heads) ** 0.5) ** 0.5)

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Scores of patch tokens B×N×C by the class token B×1×C: B×N in (0, 1), float32."""
        width = cls.shape[-1]
        weight, bias = linear_weight(self.qk), linear_bias(self.qk)
        assert bias is not None
        q_weight, k_weight, _ = weight.split(width)
        q_bias, k_bias, _ = bias.split(width)
        cls, patches = (F.layer_norm(x, (width,), eps=1e-5) for x in (cls, patches))
        q = F.linear(cls[:, 0], q_weight, q_bias).unflatten(-1, (self.heads, -1))
        with full_precision(cls.device):  # half precision would tie scores near the threshold
            q = q.float() * q.shape[-1] ** -0.5
            asked = torch.einsum("bhd,hdc->bhc", q, k_weight.float().unflatten(0, (self.heads, -1)))
            offset = (q * k_bias.float().unflatten(0, (self.heads, -1))).sum(-1, keepdim=True)
            return (asked @ patches.float().transpose(1, 2) + offset).sigmoid().mean(dim=1)
