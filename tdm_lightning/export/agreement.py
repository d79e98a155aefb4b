"""Whether a file that was written gives what the model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tdm_lightning.errors import SettingError

#: Largest difference allowed between the logits of the file and those of the model, relative to the
#: largest logit above 1.
TOLERANCE = 1e-4

#: How far pixels move, relative to themselves, to find near ties, and how many times that is drawn.
_ROUNDING, _TRIES = 1e-6, 8


class Agreement(NamedTuple):
    """How well a file and a model agree.

    Attributes:
        difference: largest difference between their logits.
        images: how many images that is over.
        ties: how many were left out, because rounding decides between their tokens.
    """

    difference: float
    images: int
    ties: int


@torch.no_grad()
def compare_logits(
    model: nn.Module, run: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> Agreement:
    """Whether a file gives a model's logits.

    Where rounding decides between two tokens, another runtime may decide in the other way, and
    neither is wrong. An image is such a near tie if the model's own logits change by more than is
    allowed once its pixels move by 1e-6 of themselves, a few roundings of float32; it is left out.

    Args:
        model: in evaluation mode, on the CPU.
        run: the file, from images to logits.
        batches: of images, B×C×H×W.

    Raises:
        ValueError: if the logits of an image that is no near tie differ by more than
            :data:`TOLERANCE`, or all images are ties.
    """
    largest, compared, ties = 0.0, 0, 0
    for images in batches:
        expected = model(images)
        found = _distance(run(images), expected)
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        wrong = ~(found <= allowed)  # NaN is wrong too
        if wrong.any() and (reason := _no_excuse(model, images, expected, found, allowed)):
            raise SettingError(
                f"the exported file gives other logits than the model for {int(wrong.sum())} of"
                f" {len(images)} images: they differ by up to {found.max():.2g}, and {allowed:.2g}"
                f" is allowed; no file was kept ({reason})"
            )
        ties += int(wrong.sum())
        compared += int((~wrong).sum())
        largest = max([largest, *found[~wrong].tolist()])
    if not compared:
        raise SettingError(
            "the exported file could not be compared with the model: rounding decides between"
            f" tokens in all {ties} images, as it may with random weights; no file was kept. Give"
            " it images of the kind that the model was trained on"
        )
    return Agreement(largest, compared, ties)


def _no_excuse(
    model: nn.Module, images: Tensor, expected: Tensor, found: Tensor, allowed: float
) -> str:
    """Why not all images whose logits differ by more than is allowed are near ties; empty if they
    are.
    """
    if not torch.allclose(model(images), expected, atol=allowed):
        return "the model draws at random, so no file can repeat it: turn that off in the strategy"
    generator = torch.Generator().manual_seed(0)
    moving = found <= allowed
    for _ in range(_TRIES):
        moved = images * (1 + _ROUNDING * torch.randn(images.shape, generator=generator))
        moving |= _distance(model(moved), expected) > allowed
    if moving.all() and found.isfinite().all():
        return ""
    return (
        "rounding is not the reason: the model's own logits stay when the pixels move by 1e-6 of"
        " themselves"
    )


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """Largest difference between the logits of each image, B."""
    return (found - expected).abs().flatten(1).amax(dim=1)
