"""The network with which SPViT tells tokens to keep from tokens to pack away: one vote per
attention head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MultiHeadSelector(nn.Module):
    """Keep or drop, by every head's slice of the token and a gate that weighs the heads (Kong et
    al., SPViT, 2022, §3.2).

    Each slice of width d = C/H goes through DynamicViT's predictor in small: ``LayerNorm → Linear
    d→d → GELU``, the second half averaged over the tokens still there, ``Linear → GELU →
    Linear → GELU → Linear`` down to two logits. The gate, a squeeze-and-excitation over the
    heads, weighs head h of each token by ``w_h``, a sigmoid of the mean of every slice.

    Parameter names are those of the official checkpoints (``score_predictor.{stage}.…``), whose
    ``{h}`` copies are one tensor.

    Args:
        width: C of the tokens.
        heads: H, a divisor of the width.
        shared: one MLP for all heads, as in the official code, 6,975 parameters on DeiT-S;
            otherwise one for each, as the paper draws it, 41,625.
    """

    def __init__(self, width: int, heads: int, shared: bool = True) -> None:
        super().__init__()
        self.heads = heads
        d, squeezed = width // heads, max(1, heads // 2)
        self.local = d // 2
        mlps = 1 if shared else heads
        self.in_conv = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU()) for _ in range(mlps)
        )
        self.out_conv = nn.ModuleList(
            nn.Sequential(
                nn.Linear(d, d // 2),
                nn.GELU(),
                nn.Linear(d // 2, d // 4),
                nn.GELU(),
                nn.Linear(d // 4, 2),
            )
            for _ in range(mlps)
        )
        self.senet = nn.Sequential(
            nn.Linear(heads, squeezed), nn.GELU(), nn.Linear(squeezed, heads), nn.Sigmoid()
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and keep probability of every token, both float32.

        Args:
            x: patch tokens, B×N×C.
            policy: which of them are still there, B×N; ``None``: all.

        Returns:
            ``Σ_h w_h·log_softmax_h / Σ_h w_h``, B×N×2, for keeping and for dropping; not
            normalised. And ``Σ_h w_h·softmax_h / Σ_h w_h`` of keeping, B×N.
        """
        slices = x.unflatten(-1, (self.heads, -1))
        gate = self.senet(slices.mean(dim=-1)).float()
        share = gate / gate.sum(dim=-1, keepdim=True)
        h = _by_head(self.in_conv, slices)
        local, seen = h[..., : self.local], h[..., self.local :].float()
        if policy is None:
            mean = seen.mean(dim=1, keepdim=True)
        else:
            total = policy.sum(dim=1).clamp(min=1)
            mean = (seen * policy[:, :, None, None]).sum(dim=1, keepdim=True) / total[
                :, None, None, None
            ]
        context = mean.to(h.dtype).expand_as(seen)
        logits = _by_head(self.out_conv, torch.cat((local, context), dim=-1)).float()
        votes = (share.unsqueeze(-1) * logits.log_softmax(dim=-1)).sum(dim=2)
        return votes, (share * logits.softmax(dim=-1)[..., 0]).sum(dim=-1)


def _by_head(mlps: nn.ModuleList, x: Tensor) -> Tensor:
    """B×N×H×d through the MLP of each head, or through the one that all share."""
    if len(mlps) == 1:
        return mlps[0](x)
    return torch.stack([mlp(part) for mlp, part in zip(mlps, x.unbind(dim=2), strict=True)], dim=2)
