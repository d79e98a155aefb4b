"""Image files in, pictures, animations and pages out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich.progress import Progress

from tdm_lightning.core.checks import check_choice
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.frames import contact_sheet, save_animation
from tdm_lightning.visualize.images import SIDE, open_image
from tdm_lightning.visualize.page import save_page
from tdm_lightning.visualize.panels import panels
from tdm_lightning.visualize.sheet import (
    make_folder,
    save_panels,
    save_schools,
    save_sheet,
    split_rows,
    titles,
)
from tdm_lightning.visualize.story import Story, tell
from tdm_lightning.vit import TokenReducedViT

#: A picture; an animation through the blocks; a page that tells of the patch one points at.
Format = Literal["png", "gif", "html"]
FORMATS: tuple[Format, ...] = ("png", "gif", "html")


def visualize_images(
    paths: Sequence[str | Path],
    model: TokenReducedViT,
    out_dir: str | Path = "panels",
    layer: int = -1,
    side: int = SIDE,
    together: bool = False,
    formats: Sequence[Format] = ("png",),
    progress: Progress | None = None,
) -> list[Path]:
    """Draw what a model makes of image files.

    Images go through timm's evaluation transform for the model. Everything is checked before
    anything is written.

    Args:
        paths: image files.
        model: a reduced model.
        out_dir: folder for the files, named after the images.
        layer: see :func:`~tdm_lightning.visualize.panels`.
        side: pixels of the shorter side of each panel of a PNG.
        together: write one ``panels.png``, with the schools of each image in a row.
        formats: what to write of ``cat.jpg``: ``"png"``, ``cat_panels.png`` with
            :func:`~tdm_lightning.visualize.panels`, the schools in a row and the layers below;
            ``"gif"``, ``cat_tokens.gif``, an animation of its tokens through the blocks;
            ``"html"``, ``cat_tokens.html``, a page to point at patches.
        progress: where to show a bar.

    Returns:
        The files written.

    Raises:
        TypeError: if the model is not reduced.
        ValueError: if no image is given, one cannot be read, a format is unknown, or the folder
            cannot be written.
    """
    formats, folder, names = _checked(paths, formats, out_dir)
    written = []
    for name, path in _tracked(progress, names, paths):
        image = open_image(path)
        if "png" in formats and not together:
            rows = split_rows(panels(model, image, layer))
            written.append(save_panels(folder / f"{name}_panels.png", rows, side, titles(model)))
        if {"gif", "html"} & set(formats):
            written += _told([tell(model, image)], folder / f"{name}_tokens", name, formats)
    if "png" in formats and together:
        images = [open_image(path) for path in paths]
        written.append(save_schools(folder / "panels.png", images, model, layer, side))
    return written


def visualize_methods(
    paths: Sequence[str | Path],
    methods: Sequence[tuple[str, TokenReducedViT]],
    out_dir: str | Path = "panels",
    formats: Sequence[Format] = ("png",),
    progress: Progress | None = None,
) -> list[Path]:
    """Draw what several methods make of image files, side by side.

    Args:
        paths: image files.
        methods: what each is called, and a model under it; all with equally many blocks and
            patches.
        out_dir: folder for the files, named after the images.
        formats: what to write of ``cat.jpg``: ``"png"``, ``cat_methods.png``, a contact sheet of
            what is left after the last block; ``"gif"`` and ``"html"`` as
            :func:`visualize_images`, of all methods.
        progress: where to show a bar.

    Returns:
        The files written.

    Raises:
        TypeError, ValueError: as :func:`visualize_images`; if there is no method, or they do not
            fit together.
    """
    formats, folder, names = _checked(paths, formats, out_dir)
    written = []
    for name, path in _tracked(progress, names, paths):
        image = open_image(path)
        stories = [tell(model, image, title) for title, model in methods]
        target = folder / f"{name}_methods"
        if "png" in formats:
            written.append(
                save_sheet(folder / f"{name}_methods.png", contact_sheet(stories), colours=256)
            )
        written += _told(stories, target, name, formats)
    return written


def _checked(
    paths: Sequence[str | Path], formats: Sequence[Format], out_dir: str | Path
) -> tuple[list[Format], Path, list[str]]:
    """The formats, the folder, and a name for each image, once nothing speaks against them."""
    if not paths:
        raise SettingError("no image to draw: give the path of at least one")
    chosen = [check_choice(each, FORMATS, "formats") for each in formats]
    if not chosen:
        raise SettingError(f"nothing to write: formats takes at least one of {', '.join(FORMATS)}")
    for path in paths:
        open_image(path)
    return chosen, make_folder(out_dir), _distinct([Path(path).stem for path in paths])


def _told(stories: list[Story], target: Path, name: str, formats: Sequence[Format]) -> list[Path]:
    written = []
    if "gif" in formats:
        written.append(save_animation(target.parent / f"{target.name}.gif", stories))
    if "html" in formats:
        written.append(save_page(target.parent / f"{target.name}.html", stories, name))
    return written


def _tracked(
    progress: Progress | None, names: Sequence[str], paths: Sequence[str | Path]
) -> Iterable[tuple[str, str | Path]]:
    shown = progress or Progress(disable=True)
    return shown.track(list(zip(names, paths, strict=True)), description="images")


def _distinct(names: Sequence[str]) -> list[str]:
    """Files of one name from several folders must not overwrite each other."""
    seen: dict[str, int] = {}
    numbered = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return numbered
