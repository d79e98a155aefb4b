"""What the study's figures show of results far below the others."""

from __future__ import annotations

import pytest

from benchmarks.study import figures
from benchmarks.study.results import Result

ACCURACY = {
    ("Plain", 1.0): 0.9,
    ("TDM", 0.5): 0.88,
    ("EViT", 0.5): 0.8,
    ("DyViT", 0.5): 0.4,
    ("Evo-ViT", 0.5): 0.3,
}


@pytest.fixture
def results():
    def made(method, rate, accuracy):
        both = {"before": accuracy, "after": accuracy}
        scores = {when: [4.0, 3.0] for when in both}
        return Result(method, rate, 1, gmacs=0.1, accuracy=both, diversity=scores, tokens=[4, 2])

    return [made(method, rate, accuracy) for (method, rate), accuracy in ACCURACY.items()]


def texts(axis):
    return {text.get_text(): text for text in axis.texts}


def heights(axis):
    return {y for line in axis.lines for y in line.get_ydata()}


def test_accuracies_end_twenty_points_below_the_plain_model(results):
    for axis in figures.accuracy_against_gmacs(results).axes:
        assert axis.get_ylim()[0] == pytest.approx(70)
        assert axis.get_ylim()[1] > 90
        assert set(texts(axis)) == {"Plain", "TDM", "EViT", "DyViT ↓ 40.0", "Evo-ViT ↓ 30.0"}
        assert 90 in heights(axis)  # the plain model's line


def test_accuracies_that_lie_close_together_are_shown_large(results):
    for axis in figures.accuracy_against_gmacs(results[:2]).axes:
        assert axis.get_ylim()[0] > 80


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_line_that_ends_below_the_panel_is_named_where_it_leaves_it(side):
    points = [(1.0, 60, 0, 0), (2.0, 80, 0, 0), (3.0, 60, 0, 0), (4.0, 40, 0, 0)]
    (label,) = figures.end_labels({"TDM": points}, 70, side)
    assert (label.x, label.y) == ((1.5, 60) if side == "left" else (2.5, 40))
    assert label.text == ("TDM ↓ 60.0" if side == "left" else "TDM ↓ 40.0")
    (label,) = figures.end_labels({"TDM": points[2:]}, 70, "right")
    assert label.x == 4


def test_losses_per_keep_rate_are_relative_to_the_plain_model(results):
    (axis,) = figures.accuracy_per_keep_rate(results).axes
    assert axis.get_ylim()[0] == pytest.approx(-20)
    assert set(texts(axis)) == {"Plain", "TDM", "EViT", "DyViT ↓ −50.0", "Evo-ViT ↓ −60.0"}
    assert {-2, -10} <= {round(y, 6) for y in heights(axis)}


def test_losses_below_the_panel_are_named_in_their_column(results):
    lower = [Result(**{**vars(each), "rate": 0.3}) for each in results[1:]]
    (axis,) = figures.accuracy_per_keep_rate([*results, *lower]).axes
    named = [text for text in axis.texts if text.get_text() == "DyViT ↓ −50.0"]
    assert len(named) == 2  # in the column of 0.5, and beside the panel
    assert {text.xy[0] for text in named} > {0}


def test_the_plain_model_is_within_the_panel_beside_the_diversity(results):
    _, axis = figures.diversity_beside_accuracy(results, 0.5).axes
    left, right = axis.get_xlim()
    assert left == pytest.approx(70)
    assert right > 90
    assert {"← 40.00", "← 30.00", "88.00", "80.00", "Plain"} == set(texts(axis))


def test_without_a_plain_model_nothing_is_cut_off(results):
    _, axis = figures.accuracy_against_gmacs(results[1:]).axes
    assert axis.get_ylim()[0] < 30
    assert set(texts(axis)) == {"TDM", "EViT", "DyViT", "Evo-ViT"}
