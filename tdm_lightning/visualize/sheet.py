"""Sheets of titled panels, and their files."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.draw import WHITE
from tdm_lightning.visualize.images import SIDE
from tdm_lightning.visualize.panels import Panels, panels
from tdm_lightning.vit import TokenReducedViT

Row = Mapping[str, Image.Image]


def arrange(
    rows: Sequence[Row], side: int = SIDE, titles: Mapping[str, str] | None = None
) -> Image.Image:
    """Rows of panels on one white sheet; a row's names stand above it where they differ from those
    of the row before.

    Args:
        rows: panels by name.
        side: pixels of each panel's shorter side.
        titles: what to print in place of a name.

    Raises:
        ValueError: if there is nothing to arrange.
    """
    if not any(rows):
        raise SettingError("there are no panels to arrange")
    gap, letters = max(4, side // 28), max(11, side // 16)
    line, font = round(1.7 * letters), ImageFont.load_default(letters)
    placed: list[tuple[int, int, Image.Image]] = []
    written: list[tuple[int, int, str]] = []
    y, right, before = gap, 0, None
    for row in rows:
        sized = {name: scaled(panel, side) for name, panel in row.items()}
        x, top = gap, y + (line if list(row) != before else 0)
        for name, panel in sized.items():
            if top > y:
                written.append(
                    (x + panel.width // 2, y + line // 2, (titles or {}).get(name, name))
                )
            placed.append((x, top, panel))
            x += panel.width + gap
        right, before = max(right, x), list(row)
        y = top + max(panel.height for panel in sized.values()) + gap
    sheet = Image.new("RGB", (right, y), WHITE)
    for x, top, panel in placed:
        sheet.paste(panel, (x, top))
    draw = ImageDraw.Draw(sheet)
    for x, middle, title in written:
        draw.text((x, middle), title, fill="black", font=font, anchor="mm")
    return sheet


def save_panels(
    path: str | Path,
    rows: Sequence[Row],
    side: int = SIDE,
    titles: Mapping[str, str] | None = None,
    colours: int | None = None,
) -> Path:
    """Arrange panels and write them as one PNG.

    Args:
        path: the file; its folder is made if need be.
        rows: see :func:`arrange`.
        side: see :func:`arrange`.
        titles: see :func:`arrange`.
        colours: reduce the picture to so many colours, at most 256: a third of the size.

    Raises:
        ValueError: if the file cannot be written, or there is nothing to write.
    """
    return save_sheet(path, arrange(rows, side, titles), colours)


def save_sheet(path: str | Path, sheet: Image.Image, colours: int | None = None) -> Path:
    """Write a picture as a small PNG; arguments and errors as :func:`save_panels`."""
    data = io.BytesIO()
    (sheet.quantize(colours) if colours else sheet).save(data, "PNG", optimize=True)
    return write_bytes(path, data.getvalue())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file; its folder is made if need be.

    Raises:
        ValueError: if it cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise SettingError(f"cannot write {str(path)!r}: {error}") from error
    return path


def save_schools(
    path: str | Path,
    images: Sequence[Image.Image],
    model: TokenReducedViT,
    layer: int = -1,
    side: int = SIDE,
) -> Path:
    """Draw several images on one sheet of few colours, the schools of each in a row; arguments as
    above.
    """
    rows = [split_rows(panels(model, image, layer))[0] for image in images]
    return save_panels(path, rows, side, titles(model), colours=256)


def titles(model: TokenReducedViT) -> dict[str, str]:
    """What to print over the panels of a model, where that is not their name."""
    return {
        "importance": "importance-based",
        "diversity": "diversity-based",
        "reduced": type(model.strategy).__name__,
    }


def split_rows(drawn: Panels) -> list[Panels]:
    """The schools in one row, the layers in the next."""
    layers = {name: panel for name, panel in drawn.items() if name.startswith("block ")}
    schools = {name: panel for name, panel in drawn.items() if name not in layers}
    return [schools, layers] if layers else [schools]


def make_folder(path: str | Path) -> Path:
    """A folder that can be written to, made if need be.

    Raises:
        ValueError: if it cannot.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingError(
            f"cannot write to the folder {str(folder)!r}: {reason}; choose another"
        ) from error
    return folder


def scaled(panel: Image.Image, side: int) -> Image.Image:
    """A picture with a shorter side of so many pixels."""
    factor = side / min(panel.size)
    size = (round(panel.width * factor), round(panel.height * factor))
    return panel if size == panel.size else panel.resize(size, Image.Resampling.LANCZOS)
