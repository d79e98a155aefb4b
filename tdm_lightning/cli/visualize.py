"""``tdm visualize IMAGE…``: draw what becomes of an image's patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tdm_lightning.cli.chosen import check_trained, choose_model
from tdm_lightning.cli.progress import bars, say_where
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies import Strategy
from tdm_lightning.visualize.files import Format
from tdm_lightning.vit import TokenReducedViT


def visualize(
    images: list[str],
    weights: bool | str | None = None,
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    strategy: Strategy | None = None,
    strategies: list[Strategy] | None = None,
    match_gmacs: float | None = None,
    formats: Format | list[Format] = "png",
    random_weights: bool = False,
    out: str = "panels",
    layer: int = -1,
    together: bool = False,
) -> list[Path]:
    """Draw what becomes of the patches of image files: as panels (original, importance-based,
    diversity-based, reduced, and the reducing blocks one by one), as an animation through the
    blocks, or as a page that tells of the patch one points at.

    Args:
        images: image files.
        weights: a checkpoint of ``tdm fit``, a folder that ``save_pretrained`` wrote or a hub
            repository, which bring along what is not given of model and strategy; an official
            checkpoint; or ``true`` for timm's pretrained weights.
        model: the name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``.
        strategy: the token-reduction method; ``None``: that of the weights, or TDM at 0.7.
        strategies: several methods side by side in its place: a contact sheet of each image, an
            animation and a page with all of them.
        match_gmacs: solve the settings of all ``strategies`` for this many 10⁹
            multiply-accumulates per image.
        formats: of each image, ``png``: the panels or the contact sheet; ``gif``: the animation;
            ``html``: the page; one or several.
        random_weights: draw with an untrained model all the same; its attention means nothing.
        out: folder for the files, named after the images.
        layer: which reducing block the panels show, counted among them; -1: the last.
        together: write one ``panels.png``, an image in each row, without the blocks one by one.

    Returns:
        The files written.

    Raises:
        ValueError: without trained weights, for an image that cannot be read or a folder that
            cannot be written.
    """
    from tdm_lightning.visualize import visualize_images, visualize_methods

    check_trained(weights, random_weights, "an untrained model's attention means nothing")
    wanted: list[Format] = formats if isinstance(formats, list) else [formats]
    if strategies is None and match_gmacs is not None:
        raise SettingError(
            "match_gmacs is for several methods: give them with --strategies+=NAME, or one with"
            " --strategy NAME and its own setting"
        )
    if strategies is None:
        reduced = choose_model(weights, model, model_kwargs, strategy).model
        with torch.inference_mode(), bars() as progress:
            written = visualize_images(
                images, reduced, out, layer, together=together, formats=wanted, progress=progress
            )
    else:
        with bars() as progress:
            methods = [
                _under(each, weights, model, model_kwargs, match_gmacs)
                for each in progress.track(strategies, description="models")
            ]
            with torch.inference_mode():
                written = visualize_methods(images, methods, out, wanted, progress)
    say_where(written)
    return written


def _under(
    strategy: Strategy,
    weights: bool | str | None,
    model: str,
    model_kwargs: dict[str, Any] | None,
    match_gmacs: float | None,
) -> tuple[str, TokenReducedViT]:
    """What a method is called, and the model under it."""
    from tdm_lightning.compare.methods import make_method

    method = make_method(strategy, model, model_kwargs or {}, weights, match_gmacs)
    if method.remark:
        raise SettingError(
            f"{method.name} cannot be drawn with these weights: {method.remark}; leave it out, or"
            " give weights that it was trained with"
        )
    assert isinstance(method.model, TokenReducedViT)
    title = f"{method.name} ({method.settings})" if method.settings else method.name
    return title, method.model
