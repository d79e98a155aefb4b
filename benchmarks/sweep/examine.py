"""What a model must do under a strategy before it counts as reduced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core import Reduction, Role, Tokens
from tdm_lightning.ops import gather_tokens, inverse_order
from tdm_lightning.strategies import TDM, Strategy
from tdm_lightning.vit.adapters import model_info
from tdm_lightning.vit.attach import attach

KEEP_RATE = 0.7

#: Outputs are the same below the first and differ above the second, as a share of the plain
#: output's spread.
SAME, OTHER = 1e-4, 1e-3


class Shuffled(Strategy):
    """Changes the order of the patch tokens in front of every block, and nothing else.

    Args:
        follow: whether their positions go with them; without, a model that asks where a token is
            goes wrong.
    """

    def __init__(self, follow: bool = True) -> None:
        super().__init__()
        self.follow = follow

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Another order for each image and block, the same ones in every pass."""
        generator = torch.Generator().manual_seed(index)
        order = torch.stack(
            [torch.randperm(tokens.count, generator=generator) for _ in tokens.x]
        ).to(tokens.x.device)
        x = gather_tokens(tokens.patches, order)
        if not self.follow:
            return tokens.replace(x=torch.cat((tokens.x[:, : tokens.prefix], x), dim=1))
        return tokens.reduced(
            index, Reduction(x, inverse_order(order), torch.full_like(order, Role.KEPT))
        )


@dataclass(frozen=True)
class Examined:
    """What the checks found; gaps are the largest difference to plain timm, divided by the plain
    output's standard deviation.

    Attributes:
        tokens: patch tokens in front of the first block, and after each.
        identity: gap at keep rate 1.
        shuffled: gap with patches and their positions shuffled in front of every block.
        stray: gap with positions left behind; NaN where no block asks for them.
        reduced: gap at :data:`KEEP_RATE`.
        problems: the checks that the model did not pass.
    """

    tokens: list[int]
    identity: float
    shuffled: float
    stray: float
    reduced: float
    problems: list[str]


def quarter_layers(depth: int) -> tuple[int, ...]:
    """The blocks behind each quarter of a model: TDM's layers for any depth.

    >>> quarter_layers(12), quarter_layers(24), quarter_layers(2)
    ((3, 6, 9), (6, 12, 18), (0, 1))
    """
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


def reduction(vit: Any, keep_rate: float = KEEP_RATE) -> TDM:
    """TDM for a timm model of any depth, also one that turns out to have no blocks."""
    return TDM(keep_rate, quarter_layers(len(getattr(vit, "blocks", ()))))


@torch.no_grad()
def randomize(vit: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a say.

    Freshly made models hold zeros, LayerScales of 1e-5 and tables of 0.02, under which a mistake
    would not show. Weights of layers are scaled to keep the spread of what passes through; to
    everything else is added a fifth of a normal number.
    """
    layers = {
        id(layer.weight) for layer in vit.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    for parameter in vit.parameters():
        if id(parameter) not in layers:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            continue
        if parameter.std() == 0:
            parameter.normal_(generator=generator)
        parameter.mul_(parameter[0].numel() ** -0.5 / parameter.std())


def examine(vit: Any, images: Tensor) -> Examined:
    """Run all checks on a model whose parameters all count, see :func:`randomize`.

    Args:
        vit: a timm model that ``attach`` takes, in evaluation mode; its gradients are filled.
        images: B×C×H×W.
    """
    with torch.no_grad():
        plain = vit(images)
        identity = _gap(attach(vit, reduction(vit, 1.0))(images), plain)
        shuffled = _gap(attach(vit, Shuffled())(images), plain)
        stray = math.nan
        if model_info(vit).relative_positions:
            stray = _gap(attach(vit, Shuffled(follow=False))(images), plain)
    logits, trace = attach(vit, reduction(vit)).trace(images)
    logits.square().mean().backward()
    reduced = _gap(logits.detach(), plain)
    counts = [model_info(vit).patches, *trace.token_counts]
    problems = {
        "its own output is not finite": not plain.isfinite().all(),
        f"at keep rate 1 it is off by {identity:.1e}": not identity < SAME,
        f"with its patches shuffled it is off by {shuffled:.1e}": not shuffled < SAME,
        f"positions that stay behind change only {stray:.1e}, so the shuffling proves nothing": (
            stray < OTHER
        ),
        f"its tokens do not fall in every reducing layer: {counts}": not _falls(counts),
        "its reduced output is not finite": not logits.isfinite().all(),
        f"its reduced output differs by {reduced:.1e} only": reduced < OTHER,
        "its gradients are not finite, or do not reach the patches": not _gradients_flow(vit),
    }
    return Examined(
        counts,
        identity,
        shuffled,
        stray,
        reduced,
        [text for text, found in problems.items() if found],
    )


def _gap(output: Tensor, plain: Tensor) -> float:
    return float((output - plain).abs().max() / plain.std())


def _falls(counts: list[int]) -> bool:
    """Whether every reducing layer leaves fewer tokens than came in."""
    return all(counts[layer + 1] < counts[layer] for layer in quarter_layers(len(counts) - 1))


def _gradients_flow(vit: Any) -> bool:
    if not all(
        parameter.grad.isfinite().all()
        for parameter in vit.parameters()
        if parameter.grad is not None
    ):
        return False
    embedding = getattr(vit, "patch_embed", None) or vit.embeds  # NaFlexVit has its own name
    first = next(embedding.parameters())
    return first.grad is not None and bool(first.grad.abs().sum() > 0)
