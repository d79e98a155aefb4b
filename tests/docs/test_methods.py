"""A page for each method, with its picture and what it costs."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning import sparsity, strategies

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
PAGES = {path.stem: path.read_text("utf-8") for path in FOLDER.glob("*.md")}
#: Of the poster's and later systems; the others are what those are made of.
PARTS = {"Distillation", "Requirements", "Stack", "Strategy", "TokenReduction", "TrainingObjective"}
METHODS = {*strategies.__all__, "SViTE"} - PARTS
HEADINGS = ["Formula", "Official, and what is not", "Cost", "Parameters", "Source"]


def test_every_method_has_a_page():
    assert {*PAGES} - {"index"} == {name.lower() for name in METHODS}
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\)", PAGES["index"], re.MULTILINE)
    assert {name for name, _ in listed} == METHODS
    assert all(name.lower() == page for name, page in listed)
    assert sparsity.SViTE is tdm.SViTE


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_page_says_all_that_it_should(name):
    page = PAGES[name.lower()]
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == HEADINGS
    assert f"autoclass:: tdm_lightning.{name}\n" in page
    assert page.startswith(f"# {name}\n")
    for picture in re.findall(r"\]\((\w+\.png)\)", page):
        assert (FOLDER / picture).stat().st_size < 60_000
    assert (f"]({name.lower()}.png)" in page) != ("No picture" in page)


STATED = {
    name: re.search(r"`(tdm\.\S.*)` on\s+DeiT-S\s+costs (\d\.\d{3}) of 4\.599", page)
    for name, page in PAGES.items()
}


@pytest.mark.parametrize("name", [name for name, found in STATED.items() if found])
def test_the_cost_is_what_is_counted(name):
    settings, gmacs = STATED[name].groups()
    pool = {"global_pool": "avg"} if name == "evovit" else {}
    with torch.device("meta"):
        vit = timm.create_model("deit_small_patch16_224", **pool)
    model = tdm.attach(vit, eval(settings, {"tdm": tdm}))
    assert f"{tdm.flops.count_macs(model) / 1e9:.3f}" == gmacs


def test_a_picture_is_drawn_for_every_page_that_shows_one(tmp_path):
    pytest.importorskip("skimage")
    spec = importlib.util.spec_from_file_location("pictures", FOLDER.parent / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    assert {*pictures.METHODS} == {path.stem for path in FOLDER.glob("*.png")}
    path = pictures.draw("evit", None, tmp_path, side=48)
    assert path.read_bytes().startswith(b"\x89PNG")
