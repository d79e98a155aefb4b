"""How far a method moves what a pretrained ViT makes of images. Fidelity to the unreduced model,
not accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_lightning.core import Output
from tdm_lightning.ops import unmerge
from tdm_lightning.strategies import Strategy
from tdm_lightning.vit import TokenReducedViT, attach


@dataclass(frozen=True)
class Fidelity:
    """One method at one budget on the crops of one draw.

    Attributes:
        method: its name.
        rate: TDM's keep rate whose budget it has.
        gmacs: 10⁹ multiply-accumulates, all of them.
        draw: seed of the crops.
        pooled: 1 − cosine between the features that a classifier reads, reduced and unreduced, of
            each crop.
        dense: the same of the patch features, mean over the patches; 1 for dropped ones.
    """

    method: str
    rate: float
    gmacs: float
    draw: int
    pooled: list[float]
    dense: list[float]


@torch.inference_mode()
def observed(
    vit: nn.Module, strategy: Strategy, images: Tensor, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Pooled features, B×C, and dense final features, B×N0×C."""
    model: TokenReducedViT = attach(vit, strategy).eval()
    pooled, dense = [], []
    for batch in images.split(batch_size):
        output = model.run(batch, trace=True)
        pooled.append(model.forward_head(output.features, output.size, pre_logits=True))
        dense.append(dense_features(model, output))
    return torch.cat(pooled), torch.cat(dense)


def dense_features(model: TokenReducedViT, output: Output) -> Tensor:
    """The feature of the token that holds each patch, B×N0×C; zero where it was dropped."""
    assert output.trace is not None
    trace, patches = output.trace, output.features[:, model.num_prefix_tokens :]
    return unmerge(patches, trace.layers[-1].assignment) if trace.layers else patches


def distances(
    plain: tuple[Tensor, Tensor], reduced: tuple[Tensor, Tensor]
) -> tuple[list[float], list[float]]:
    """``pooled`` and ``dense`` of :class:`Fidelity`; arguments from :func:`observed`."""
    pooled = 1 - F.cosine_similarity(plain[0].double(), reduced[0].double(), dim=-1)
    dense = 1 - F.cosine_similarity(plain[1].double(), reduced[1].double(), dim=-1).mean(dim=1)
    return pooled.tolist(), dense.tolist()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    return fmean(values), stdev(values) / len(values) ** 0.5
