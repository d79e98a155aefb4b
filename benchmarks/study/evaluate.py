"""Which images a model gets right, and how different its tokens stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_lightning.metrics import DiversityRecorder
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.find import hook_blocks

#: Images that the diversity score is the mean over, spread evenly: it takes longer than the pass
#: itself.
SAMPLED = 100


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a set of images.

    Attributes:
        correct: N, bool.
        diversity: the score of the patch tokens after each block.
        tokens: how many patch tokens those are.
    """

    correct: Tensor
    diversity: list[float]
    tokens: list[int]

    @property
    def accuracy(self) -> float:
        """Share of the images, in [0, 1]."""
        return self.correct.double().mean().item()


def gathered(
    batches: Iterable[tuple[Tensor, Tensor]], limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """The first images of a loader and their labels in two tensors, to read a split once and
    evaluate on it often.
    """
    images, labels, count = [], [], 0
    for batch, target in batches:
        images.append(batch)
        labels.append(target)
        count += len(target)
        if limit is not None and count >= limit:
            break
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]


@torch.inference_mode()
def evaluate(
    model: TokenReducedViT, images: Tensor, labels: Tensor, batch_size: int = 100
) -> Evaluation:
    """Classify images, and score the diversity of the tokens on some of them.

    Args:
        model: on any device; left in evaluation mode.
        images: N×C×H×W.
        labels: N.
        batch_size: images in a pass.
    """
    model.eval()
    device = next(model.parameters()).device
    correct = [
        (model(batch.to(device)).argmax(dim=1).cpu() == target)
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    recorder, tokens = DiversityRecorder(model), [0] * len(model.vit.blocks)

    def count(block: int, x: Tensor, valid: Tensor | None) -> None:
        tokens[block] = x.shape[1] - model.num_prefix_tokens

    with recorder, hook_blocks(model, count):
        model(images[:: max(1, len(images) // SAMPLED)][:SAMPLED].to(device))
    return Evaluation(torch.cat(correct), [score.item() for score in recorder.compute()], tokens)
