"""The network with which DynamicViT tells tokens to keep from tokens to drop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeepPredictor(nn.Module):
    """Keep or drop, for every token, from itself and the mean of those still kept (Rao et al.,
    DynamicViT, 2021, §3.2).

    Parameter names are those of the official checkpoints (``score_predictor.{stage}.…``).

    Args:
        width: C of the tokens; DeiT-S (384) makes 241,250 parameters.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = width // 2
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Log-probabilities of keeping and of dropping, B×N×2, float32.

        Args:
            x: patch tokens, B×N×C.
            policy: which of them are still kept, B×N; ``None``: all.
        """
        h = self.in_conv(x)
        local, seen = h[..., : self.local], h[..., self.local :].float()
        if policy is None:
            mean = seen.mean(dim=1, keepdim=True)
        else:
            mean = (seen * policy.unsqueeze(-1)).sum(1, keepdim=True) / policy.sum(1).clamp(min=1)[
                :, None, None
            ]
        context = mean.to(h.dtype).expand(-1, h.shape[1], -1)
        return F.log_softmax(self.out_conv(torch.cat((local, context), dim=-1)).float(), dim=-1)
