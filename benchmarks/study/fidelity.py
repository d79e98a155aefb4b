"""How far a method moves what a pretrained ViT makes of photographs. Fidelity to the unreduced
model, not accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.study.plan import METHODS, RATES, Cell, chosen_methods
from benchmarks.study.results import Fidelity
from benchmarks.study.run import NoSetting, solved
from tdm_lightning.core import ModelInfo, Seen, Tokens
from tdm_lightning.ops import unmerge
from tdm_lightning.strategies import Strategy
from tdm_lightning.vit import TokenReducedViT, attach

#: Methods that need neither training nor another head.
TRAINING_FREE = ("TDM", "TDM (6 blocks)", "EViT", "TopK", "DPC-KNN", "ToMe", "Random")
#: So many blocks at the end are compared by their attention.
LAST_BLOCKS = 3


@dataclass(frozen=True)
class Watched:
    """The class attention to each patch, B×N0, by block."""

    seen: dict[int, Tensor]


class Watcher(Strategy):
    """A look at the class attention of some blocks; stands beside the strategy that reduces.

    Only for passes with a trace.
    """

    keeps_tokens = True

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)

    def needs(self, index: int, info: ModelInfo) -> frozenset[str]:
        """Importance, in the watched blocks."""
        return frozenset({"importance"} if index in self.blocks else ())

    def begin(self, tokens: Tokens) -> Tokens:
        """Nothing has been seen."""
        return tokens.replace(state=Watched({}))

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Note the attention over the tokens that the block saw."""
        if index not in self.blocks:
            return tokens
        assert seen.importance is not None
        assert tokens.history is not None
        dense = to_patches(seen.importance, tokens.history.source)
        return tokens.replace(state=Watched({**tokens.state.seen, index: dense}))


def to_patches(attention: Tensor, source: Tensor) -> Tensor:
    """Attention to tokens as attention to patches: each token's share divided evenly among the
    patches it holds.

    Args:
        attention: B×N.
        source: the token of each patch, B×N0, -1 where it was dropped.

    Returns:
        B×N0, with the same sum, but for tokens that hold no patch.

    >>> to_patches(torch.tensor([[0.6, 0.4]]), torch.tensor([[0, 0, 1, -1]]))
    tensor([[0.3000, 0.3000, 0.4000, 0.0000]])
    """
    held = (source >= 0).to(attention.dtype)
    count = torch.zeros_like(attention).scatter_add(1, source.clamp(min=0), held)
    return unmerge((attention / count.clamp(min=1)).unsqueeze(-1), source).squeeze(-1)


@torch.inference_mode()
def observed(vit: nn.Module, strategy: Strategy, images: Tensor) -> tuple[Tensor, Tensor]:
    """Dense final features, B×N0×C, and the last blocks' class attention to each patch,
    B×L×N0.
    """
    depth = len(vit.blocks)  # type: ignore[arg-type]
    blocks = range(max(0, depth - LAST_BLOCKS), depth)
    model: TokenReducedViT = attach(vit, [Watcher(blocks), strategy]).eval()
    _, (features,) = model.forward_intermediates(images, 1, norm=True, output_fmt="NLC")
    seen = model.run(images, trace=True).state[0].seen
    return features, torch.stack([seen[block] for block in blocks], dim=1)


def compare(
    plain: tuple[Tensor, Tensor], reduced: tuple[Tensor, Tensor]
) -> list[tuple[float, float, float]]:
    """``features``, ``held`` and ``attention`` of :class:`Fidelity` for each image; arguments from
    :func:`observed`.
    """
    alike = F.cosine_similarity(plain[0], reduced[0], dim=-1)
    held = reduced[0].abs().sum(-1) > 0  # dropped patches have no feature
    of_held = (alike * held).sum(1) / held.sum(1)
    attention = F.cosine_similarity(plain[1], reduced[1], dim=-1).mean(1)
    return list(zip(alike.mean(1).tolist(), of_held.tolist(), attention.tolist(), strict=True))


def measure_fidelity(
    vit: nn.Module,
    make: Callable[[Strategy], nn.Module],
    photographs: dict[str, Image.Image],
    prepare: Callable[[Image.Image], Tensor],
    methods: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    report: Callable[[str], None] = print,
) -> list[Fidelity]:
    """Every training-free method at TDM's budgets on every photograph.

    Args:
        vit: the pretrained timm model, ready for evaluation.
        make: makes a model like it, to count costs.
        photographs: by name.
        prepare: makes a tensor C×H×W of one.
        methods: only these of :data:`TRAINING_FREE`.
        rates: only these keep rates of TDM.
        report: called with a line about each method and budget.

    Raises:
        ValueError: for a method that is not among them.
    """
    images = torch.stack([prepare(image) for image in photographs.values()])
    plain = observed(vit, Strategy(), images)
    known = [method for method in METHODS if method.name in TRAINING_FREE]
    found: list[Fidelity] = []
    for rate in RATES if rates is None else rates:
        for method in chosen_methods(known, methods):
            try:
                strategy, costs = solved(Cell(method, rate, seed=1), make)
            except NoSetting as error:
                report(f"{method.name} has no setting at keep rate {rate:g}: {error}")
                continue
            scores = compare(plain, observed(vit, strategy, images))
            found += [
                Fidelity(method.name, rate, costs["gmacs"], name, *s)
                for name, s in zip(photographs, scores, strict=True)
            ]
            report(f"{method.name} at {rate:g}: features {fmean(s[0] for s in scores):.3f}")
    return found
