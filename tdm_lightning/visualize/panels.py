"""What became of an image's patches, in pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tdm_lightning.core import LayerTrace, Role, Trace
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.ops import cluster_density_peaks
from tdm_lightning.strategies import Strategy
from tdm_lightning.visualize.draw import Mask, Picture, fill_groups, mask_patches, tint_groups
from tdm_lightning.visualize.images import data_config, prepare, to_picture
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.adapters import grid_size

Panels = dict[str, Image.Image]


def panels(model: TokenReducedViT, image: Tensor | Image.Image, layer: int = -1) -> Panels:
    """Draw one image as three schools of token reduction see it (the panels of TDM's poster, Long
    et al., CVPR 2023).

    - ``original``;
    - ``importance``: the patches that were ever judged inattentive are blank, by the roles in the
      trace;
    - ``diversity``: all patches, clustered by density peaks into as many groups as ``reduced`` has
      tokens, one colour each. The features are those of the unreduced model after the same block;
    - ``reduced``: what the model did. Merged groups show their mean colour within white borders,
      patches with a token of their own are shown as they are, dropped ones are blank, parked ones
      pale.

    Then ``block 4`` and so on, for each reducing layer: ``reduced`` up to there, blocks counted
    from 1 as the papers do. Where nothing was reduced there is only the original; a method that
    ranks nothing by importance has no such panel.

    Args:
        model: a reduced model; its mode and gradients are left alone.
        image: a normalised image, C×H×W, or any PIL image, which is transformed by timm's data
            config of the model.
        layer: which of the reducing layers ``importance``, ``diversity`` and ``reduced`` show.

    Returns:
        Pictures by name, in this order, with a shorter side of at least 448 pixels.

    Raises:
        TypeError: if the model is not reduced.
        ValueError: if the image does not fit the model, or there is no such layer.
    """
    picture, batch, trace, grid = look(model, image)
    drawn = {"original": Image.fromarray(picture)}
    if trace.layers:
        with _evaluating(model):
            drawn |= _schools(model.vit, batch, trace, picture, grid, layer)
    return drawn | strip(picture, trace, grid)


def look(
    model: TokenReducedViT, image: Tensor | Image.Image
) -> tuple[Picture, Tensor, Trace, tuple[int, int]]:
    """Run a model on one image; arguments and errors as :func:`panels`.

    Returns:
        The image as a picture, as the model's batch of one, what became of its patches, and the
        rows and columns of these.
    """
    if not isinstance(model, TokenReducedViT):
        raise SettingTypeError(
            f"only what attach() returned can be drawn, got a {type(model).__name__}"
        )
    config = data_config(model)
    if isinstance(image, Image.Image):
        image, picture = prepare(image, config)
    else:
        picture = to_picture(image, config["mean"], config["std"])
    batch = image.unsqueeze(0).to(next(model.parameters()))  # device and dtype
    with _evaluating(model):
        _, trace = model.trace(batch)
    return picture, batch, trace, grid_size(model.vit, (batch.shape[-2], batch.shape[-1]))


def strip(picture: Picture, trace: Trace, grid: tuple[int, int]) -> Panels:
    """The accumulated reduction after each reducing layer of the first image of a trace.

    Args:
        picture: H×W×3, uint8.
        trace: from ``model.trace``.
        grid: rows and columns of patches.

    Returns:
        Pictures by the block's name, ``block 4`` for index 3.
    """
    return {
        f"block {layer.index + 1}": Image.fromarray(draw_layer(picture, layer, grid))
        for layer in trace.layers
    }


def draw_layer(picture: Picture, layer: LayerTrace, grid: tuple[int, int]) -> Picture:
    """The accumulated reduction after one layer, for the first image of its trace; see
    :func:`panels`.
    """
    return fill_groups(
        picture, patch_map(layer.assignment, grid), patch_map(layer.role, grid) == Role.PARKED
    )


def inattentive(trace: Trace, layer: int, grid: tuple[int, int]) -> Mask:
    """Which patches of the first image were judged unimportant up to a reducing layer, h×w.

    Clustered and dropped patches stay so; parked ones may come back.
    """
    roles = [patch_map(seen.role, grid) for seen in trace.layers]
    until = roles[: range(len(roles))[layer] + 1]
    return np.any([np.isin(role, (Role.CLUSTERED, Role.DROPPED)) for role in until], axis=0) | (
        until[-1] == Role.PARKED
    )


def _schools(
    vit: Any, batch: Tensor, trace: Trace, picture: Picture, grid: tuple[int, int], layer: int
) -> Panels:
    if not -len(trace.layers) <= layer < len(trace.layers):
        raise SettingError(
            f"layer must choose one of the {len(trace.layers)} reducing layers, got {layer}"
        )
    shown = trace.layers[layer]
    drawn = {}
    if shown.importance is not None:
        drawn["importance"] = mask_patches(picture, inattentive(trace, layer, grid))
    held, role = shown.assignment[0], shown.role[0]
    tokens = held[(held >= 0) & (role != Role.PARKED)].unique().numel()
    if tokens:
        (features,) = TokenReducedViT(vit, Strategy()).forward_intermediates(
            batch, indices=[shown.index], output_fmt="NLC", intermediates_only=True, stop_early=True
        )
        label, _ = cluster_density_peaks(features, tokens)
        drawn["diversity"] = tint_groups(picture, patch_map(label, grid))
    drawn["reduced"] = draw_layer(picture, shown, grid)
    return {name: Image.fromarray(pixels) for name, pixels in drawn.items()}


def patch_map(values: Tensor, grid: tuple[int, int]) -> Any:
    """The first image's B×N0 as an array h×w."""
    return values[0].reshape(grid).cpu().numpy()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
