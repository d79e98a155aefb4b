"""Pictures of stories side by side with captions: frames of an animation, and contact sheets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.sheet import scaled, write_bytes
from tdm_lightning.visualize.story import Story

#: Pixels of a panel's shorter side: animated alone, animated beside others, on a contact sheet.
_ALONE, _BESIDE, _SHEET = 448, 240, 320
#: Panels in a row, at most.
_COLUMNS = 4
#: Milliseconds of a block that reduces nothing, of one that does, and of the last.
_STILL, _CHANGE, _END = 250, 1000, 3000


@dataclass(frozen=True)
class Colours:
    """What stands around the panels."""

    ground: str
    ink: str
    faint: str
    accent: str


DARK = Colours("#16181d", "#f2f2f2", "#a9adb5", "#e69f00")
LIGHT = Colours("#ffffff", "#16181d", "#5a5f68", "#0072b2")


def animation(stories: Sequence[Story]) -> tuple[list[Image.Image], list[int]]:
    """Tokens merging through the blocks: a frame for the patches as they enter, and for each block.

    Args:
        stories: of one image, under one method or several on models of equal depth.

    Returns:
        The frames and for how many milliseconds each stands.

    Raises:
        ValueError: if there is no story, or their depths differ.
    """
    depths = {story.depth for story in stories}
    if len(depths) != 1:
        raise SettingError(
            f"an animation needs methods on models of one depth, got {sorted(depths)}"
        )
    (depth,) = depths
    reducing = {layer.block for story in stories for layer in story.layers[1:]}
    frames, times = [], []
    for block in range(depth + 1):
        frames.append(_frame(stories, block, sorted(reducing)))
        times.append(_CHANGE if block in reducing or not block else _STILL)
    return frames, [*times[:-1], _END]


def save_animation(path: str | Path, stories: Sequence[Story]) -> Path:
    """Write an :func:`animation` as a GIF that runs for ever.

    All frames share 255 colours and a transparent one, so that what stands still is stored once.

    Raises:
        ValueError: as there, or if the file cannot be written.
    """
    frames, times = animation(stories)
    shared = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    shared.paste(frames[0], (0, 0))
    shared.paste(frames[-1], (0, frames[0].height))
    # Median cut would lose what is small and of its own colour, such as an eye.
    palette = shared.quantize(255, Image.Quantize.FASTOCTREE)
    few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    data = io.BytesIO()
    few[0].save(
        data, "GIF", save_all=True, append_images=few[1:], duration=times, loop=0, optimize=True
    )
    return write_bytes(path, data.getvalue())


def contact_sheet(stories: Sequence[Story]) -> Image.Image:
    """One image under several methods: the original, and what each has made of it after the last
    block, with the tokens that are left.

    Raises:
        ValueError: if there is no story.
    """
    if not stories:
        raise SettingError("a contact sheet needs at least one method")
    first = stories[0]
    panels = [("original", f"{first.tokens[0]} patches", Image.fromarray(first.picture))]
    panels += [
        (story.title, _left(story, story.depth), Image.fromarray(story.drawn(story.depth)))
        for story in stories
    ]
    return _grid(panels, _SHEET, LIGHT)


def _frame(stories: Sequence[Story], block: int, reducing: Sequence[int]) -> Image.Image:
    panels = [
        (story.title, _left(story, block), Image.fromarray(story.drawn(block))) for story in stories
    ]
    side = _ALONE if len(stories) == 1 else _BESIDE
    sheet = _grid(panels, side, DARK)
    depth, letters = stories[0].depth, _letters(side)
    gap, bar = _gap(side), letters // 2
    frame = Image.new("RGB", (sheet.width, sheet.height + 2 * letters + bar + gap), DARK.ground)
    frame.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(frame)
    label = f"after block {block} of {depth}" if block else "patches as they enter"
    font = ImageFont.load_default(letters)
    draw.text((gap, sheet.height + letters // 2), label, fill=DARK.ink, font=font, anchor="lm")
    top, room = sheet.height + letters + gap, sheet.width - gap
    for place in range(depth):  # one stroke a block, those that reduce in colour
        left, right = (gap + (room - gap) * edge // depth for edge in (place, place + 1))
        colour = DARK.accent if place + 1 in reducing else DARK.faint
        low = top if place < block else top + bar - max(2, bar // 4)
        draw.rectangle((left, low, right - 3, top + bar), fill=colour)
    return frame


def _left(story: Story, block: int) -> str:
    return f"{story.tokens[block]} of {story.tokens[0]} tokens"


def _grid(
    panels: Sequence[tuple[str, str, Image.Image]], side: int, colours: Colours
) -> Image.Image:
    """Panels with a title and a line in small above each, in rows of equal length."""
    pictures = [scaled(picture, side) for _, _, picture in panels]
    width, height = pictures[0].size
    rows = -(-len(panels) // _COLUMNS)
    columns = -(-len(panels) // rows)
    gap, letters = _gap(side), _letters(side)
    head = round(2.7 * letters)
    sheet = Image.new(
        "RGB",
        (gap + columns * (width + gap), gap + rows * (head + height + gap)),
        colours.ground,
    )
    draw = ImageDraw.Draw(sheet)
    for place, ((name, line, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        title = name.replace("×", "x")  # a sign that the font lacks
        x = gap + place % columns * (width + gap)
        y = gap + place // columns * (head + height + gap)
        draw.text((x, y), title, fill=colours.ink, font=fitting(title, letters, width))
        small = fitting(line, round(0.85 * letters), width)
        draw.text((x, y + round(1.25 * letters)), line, fill=colours.faint, font=small)
        sheet.paste(picture, (x, y + head))
    return sheet


def fitting(text: str, letters: int, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The default font at the largest size up to ``letters`` in which a line fits into so many
    pixels.
    """
    for size in range(letters, 6, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            break
    return font


def _letters(side: int) -> int:
    return max(12, side // 15)


def _gap(side: int) -> int:
    return max(6, side // 24)
