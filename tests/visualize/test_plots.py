"""Labels beside plots: none over another, each as near its point as can be."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from tdm_lightning.visualize import plots
from tdm_lightning.visualize.plots import COLOURS, Label, label_beside, new_figure, spread

places = st.lists(st.floats(-2, 3, allow_nan=False), min_size=1, max_size=12)


@given(places, st.floats(0, 0.5))
def test_spread_keeps_order_distance_and_limits(wanted, gap):
    found = spread(wanted, gap, 0.0, 1.0)
    due = min(gap, 1 / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    steps = np.diff([found[i] for i in order])
    assert (steps >= due - 1e-8).all()
    assert min(found) >= -1e-8
    assert max(found) <= 1 + 1e-8


@given(st.lists(st.floats(0.2, 0.8), min_size=1, max_size=4), st.floats(0.01, 0.06))
def test_spread_is_nearest_in_least_squares(wanted, gap):
    """Against projections onto each constraint in turn (Dykstra), from the definition."""
    order = np.argsort(wanted, kind="stable")
    near = np.array(wanted)[order]
    debts = np.zeros((len(near) - 1, 2))
    for _ in range(400):
        for k in range(len(near) - 1):
            pair = near[k : k + 2] + debts[k]
            short = max(0.0, gap - (pair[1] - pair[0])) / 2
            near[k : k + 2] = pair + np.array([-short, short])
            debts[k] = pair - near[k : k + 2]
    np.testing.assert_allclose(np.array(spread(wanted, gap, 0, 1))[order], near, atol=1e-4)


def test_what_needs_no_room_stays():
    assert spread([0.9, 0.1, 0.5], 0.2, 0, 1) == [0.9, 0.1, 0.5]
    assert spread([], 0.1, 0, 1) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_written_labels_do_not_overlap_and_are_not_cut(side, scale):
    figure, (axes,) = new_figure(["a title"], width=6, height=4.5)
    y = [50, 50.1, 50.2, 51, 52, 80, 80, 80, 20, 1, 1, 99, 99.5, 30]
    axes.scatter(range(len(y)), y)
    axes.set_yscale(scale)
    axes.set_ylim(10, 90)  # some lie outside
    if side == "left":
        axes.yaxis.tick_right()
    label_beside(axes, [Label(x, v, f"method {x}", "blue") for x, v in enumerate(y)], side)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Of the letters alone, without the lines to the points.
    letters = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    extents = sorted(letters, key=lambda box: box.y0)
    assert len(extents) == len(y)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(extents))
    panel = axes.get_window_extent()
    width, height = canvas.get_width_height()
    for box in extents:
        assert box.x0 >= 0 if side == "left" else box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert box.x1 <= panel.x0 if side == "left" else box.x0 >= panel.x1


def test_colours_stay_apart_without_red_or_green_vision():
    """Under simulated protanopia and deuteranopia (Viénot, Brettel and Mollon, 1999), in linear
    light.
    """
    blind = {
        "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    linear = np.array([to_rgb(colour) for colour in (*COLOURS, plots.BLACK)]) ** 2.2
    for matrix in blind.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert apart[~np.eye(len(seen), dtype=bool)].min() > 0.1


def test_a_figure_brings_its_own_white_ground(tmp_path):
    figure, _ = new_figure([""], width=3, height=2)
    with Image.open(plots.save(figure, tmp_path / "a.png")) as picture:
        assert picture.convert("RGBA").getpixel((20, 20)) == (255, 255, 255, 255)
