"""Patch Slimming's search: from the last block to the first, keep what the blocks behind need."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.checks import check_count
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.slimming.error import relative_error
from tdm_lightning.slimming.images import take_images
from tdm_lightning.slimming.stage import Stage
from tdm_lightning.strategies import PSViT
from tdm_lightning.vit import TokenReducedViT, attach
from tdm_lightning.vit.adapters import adapter_for, model_info
from tdm_lightning.vit.find import inner_vit


@dataclass(frozen=True)
class SlimmedBlock:
    """What was found for one block.

    Attributes:
        index: the block, counted from 0.
        patches: number of patches that it computes.
        error: relative error of what the next block computes; 0 in the last block, whose class
            token is exact.
        tuned: whether the block was fine-tuned to reach it.
    """

    index: int
    patches: int
    error: float
    tuned: bool = False


@dataclass(frozen=True)
class Slimmed:
    """The outcome of a search.

    Attributes:
        model: a copy of the model with its masks, in evaluation mode, weights of tuned blocks
            included.
        blocks: what was found for each block.
        error: relative error of the class token's final feature against the plain model, all masks
            in place.
    """

    model: TokenReducedViT = field(repr=False)
    blocks: list[SlimmedBlock]
    error: float

    @property
    def masks(self) -> Tensor:
        """The patches that each block computes, depth×N, bool."""
        kept: Any = self.model.strategy.kept
        return kept


#: Decides on a block, given the stage and the order of its patches: how many it computes, the
#: error, and its tuned copy.
Choose = Callable[[Stage, Callable[[int], Tensor]], tuple[int, float, nn.Module | None]]
Done = Callable[[SlimmedBlock], None]


def search(
    vit: nn.Module,
    loader: Iterable[Any],
    bound: float = 0.02,
    step: int = 10,
    images: int = 256,
    epochs: int = 0,
    lr: float = 1e-4,
    done: Done | None = None,
) -> Slimmed:
    """Find the patches that each block must compute so that no block errs by more than a bound
    (Tang et al., CVPR 2022).

    The last block computes the class token alone. From there to the first, each block takes over
    the patches of the block behind it, and as many more, best impact first, as it takes until what
    the block behind computes differs by no more than ``bound`` from what it computes when all
    patches are there. As long as no block is fine-tuned that is what the original model computes;
    behind tuned blocks it is what these compute.

    Args:
        vit: a trained timm ViT that classifies by its class token; it is not changed.
        loader: gives images, B×C×H×W, or pairs of images and labels; training images, prepared
            as for evaluation.
        bound: largest relative error of each block, at least 0. With 0 nothing but the last block
            is slimmed.
        step: patches that are switched on at a time.
        images: number of images to look at.
        epochs: how often to go through them to fine-tune a block that exceeds the bound, before
            more of its patches are switched on; 0: never.
        lr: learning rate of that.
        done: called after each block, the last one first.

    Returns:
        The slimmed model and what was found.

    Raises:
        ValueError: if an argument is out of range, there are no images, the model pools its patches
            or computes NaN.
        TypeError: if the model cannot compute chosen rows, or the loader gives no images.
    """
    if isinstance(bound, bool) or not isinstance(bound, Real):
        raise SettingTypeError(f"bound must be a number of at least 0, got {bound!r}")
    if not 0 <= float(bound) < math.inf:
        raise SettingError(
            f"bound must be a relative error of at least 0, got {bound!r}: below that no masks can"
            " meet it"
        )
    if not lr > 0:
        raise SettingError(f"lr must be positive, got {lr!r}")
    check_count(step, "step")
    check_count(epochs, "epochs", least=0)

    def choose(stage: Stage, best: Callable[[int], Tensor]) -> tuple[int, float, nn.Module | None]:
        patches = int(stage.later.sum())
        while True:
            error = stage.error(best(patches))
            if error <= bound:
                return patches, error, None
            if epochs:
                block = stage.tuned(best(patches), epochs, lr)
                error = stage.error(best(patches), block)
                if error <= bound:
                    return patches, error, block
            if patches == len(stage.later):  # all are on, so the error is 0, or there is none
                raise SettingError(
                    "the model computes NaN or infinity on these images, so no bound can be met"
                )
            patches = min(patches + step, len(stage.later))

    return _walk(vit, loader, images, choose, done)


def select(
    vit: nn.Module,
    loader: Iterable[Any],
    counts: Sequence[int],
    images: int = 256,
    done: Done | None = None,
) -> Slimmed:
    """Choose the patches of greatest impact for given numbers of them: no bound, no training.

    Args:
        vit: as :func:`search`, as are the other arguments and errors.
        loader: gives the images.
        counts: patches that each block computes; they must not grow, and the last must be 0.
        images: number of images to look at.
        done: called after each block, the last one first.
    """
    counts = PSViT(counts=counts).schedule(len(counts), 0)
    if counts[-1]:
        raise SettingError(
            "counts must end with 0, because the head reads the class token alone; got"
            f" {list(counts)}"
        )
    attach(vit, PSViT(counts=counts))  # refuses counts that do not fit the model

    def choose(stage: Stage, best: Callable[[int], Tensor]) -> tuple[int, float, None]:
        patches = counts[stage.index]
        return patches, stage.error(best(patches)), None

    return _walk(vit, loader, images, choose, done)


@torch.no_grad()
def _walk(
    vit: nn.Module, loader: Iterable[Any], images: int, choose: Choose, done: Done | None
) -> Slimmed:
    _check_model(vit)
    slim: Any = copy.deepcopy(vit).eval()
    batches = take_images(loader, check_count(images, "images"), like=next(slim.parameters()))
    info = model_info(slim)
    for batch in batches:
        adapter_for(slim).embed(slim, batch[:1], info)  # refuses images that do not fit
    depth, patches = info.depth, info.patches
    wanted = [_class_feature(slim, batch) for batch in batches]
    kept = torch.zeros(depth, patches, dtype=torch.bool, device=batches[0].device)
    final = torch.eye(info.prefix + patches, device=kept.device)[: info.class_tokens]
    influence = [final.expand(len(batch), -1, -1) for batch in batches]
    found = [SlimmedBlock(depth - 1, 0, 0.0)]
    for index in reversed(range(depth - 1)):
        stage = Stage(slim, index, kept[index + 1], batches)
        influence = stage.influence(influence)
        best = _ranking(stage.scores(influence), stage.later)
        count, error, tuned = choose(stage, best)
        if tuned is not None:
            adapter_for(slim).blocks(slim)[index].load_state_dict(tuned.state_dict())
        kept[index] = best(count)
        found.append(SlimmedBlock(index, count, error, tuned is not None))
        if done is not None:
            done(found[-1])
    model = attach(slim, PSViT(masks=kept.int().tolist()))
    error = relative_error([_class_feature(model, batch) for batch in batches], wanted)
    return Slimmed(model, found[::-1], error)


def _check_model(vit: Any) -> None:
    attach(vit, PSViT())  # refuses models whose rows cannot be chosen
    if vit.global_pool != "token" or not model_info(vit).class_tokens:
        raise SettingError(
            "patch slimming asks what the class token needs, but this model's head reads"
            f" global_pool={vit.global_pool!r}; take a model that classifies by its class token"
            " (global_pool='token')"
        )


def _ranking(scores: Tensor, later: Tensor) -> Callable[[int], Tensor]:
    """The mask of so many patches: those that the next block computes, and then the best."""
    order = scores.masked_fill(later, math.inf).argsort(descending=True, stable=True)

    def best(patches: int) -> Tensor:
        kept = torch.zeros_like(later)
        kept[order[:patches]] = True
        return kept

    return best


def _class_feature(model: Any, images: Tensor) -> Tensor:
    """What the classifier reads, B×R×C: the class token, or the two of distilled models."""
    return model.forward_features(images)[:, : model_info(inner_vit(model)).class_tokens]
