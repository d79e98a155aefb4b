"""The notebook runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def cells(kind):
    stored = json.loads(TOUR.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in stored if cell["cell_type"] == kind]


def test_the_tour_at_real_width(capsys):
    pytest.importorskip("skimage")
    names = {"__name__": "__main__"}
    try:
        for code in cells("code"):
            exec(compile(code, TOUR.name, "exec"), names)
    finally:
        torch.set_grad_enabled(True)
    printed = capsys.readouterr().out
    assert "block 4: 256 → 180 tokens" in printed
    assert {*names["scores"]} == {"plain", "TDM", "WardTDM"}
    assert all(len(scores) == 12 and min(scores) > 0 for scores in names["scores"].values())
    assert names["saved"] > 1.9
    assert isinstance(names["leave"](0.5), Image.Image)


def test_it_is_stored_without_what_it_printed():
    stored = json.loads(TOUR.read_text("utf-8"))["cells"]
    assert [cell for cell in stored if cell.get("outputs") or cell.get("execution_count")] == []
    lines = [line for text in cells("code") + cells("markdown") for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
