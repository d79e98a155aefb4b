"""Animations, contact sheets and pages: what they show is what the trace says."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.visualize import (
    animation,
    contact_sheet,
    page,
    save_animation,
    tell,
    visualize_images,
    visualize_methods,
)
from tdm_lightning.visualize.frames import fitting
from tdm_lightning.visualize.page import ROLES
from tests.helpers.vits import lively

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def make_vit(depth=6, **arguments):
    torch.manual_seed(3)
    size = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "num_heads": 2}
    vit = VisionTransformer(**{**size, "depth": depth, "num_classes": 3, **arguments})
    return lively(vit.eval())


METHODS = {
    "TDM": (tdm.TDM(0.5, layers=(1, 3, 4)), "token"),
    "TopK": (tdm.TopK(0.5, layers=(1, 3)), "token"),
    "ToMe": (tdm.ToMe(3), "token"),
    "EvoViT": (tdm.EvoViT(0.5, layers=(2, 4)), "avg"),
    "IARED2": (tdm.IARED2(), "token"),
    "DyViT": (tdm.DyViT(0.6, layers=(1, 3)), "token"),
}


@pytest.fixture
def image():
    return torch.randn(3, 32, 48)


def methods(*names):
    return [
        (name, tdm.attach(make_vit(global_pool=METHODS[name][1]), METHODS[name][0].changed()))
        for name in names
    ]


def embedded(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_page_holds_the_trace(name, image):
    ((_, model),) = methods(name)
    (shown,) = embedded(page([tell(model, image)], "a title"))["methods"]
    _, trace = model.trace(image[None])
    assert shown["title"] == name
    assert shown["tokens"] == [24, *(int(count) for count in trace.token_counts)]
    start, *layers = shown["layers"]
    assert (start["block"], start["group"], start["importance"]) == (0, list(range(24)), None)
    assert [layer["block"] for layer in layers] == [seen.index + 1 for seen in trace.layers]
    before = start["group"]
    for layer, seen in zip(layers, trace.layers, strict=True):
        assert layer["group"] == seen.assignment[0].tolist()
        assert layer["role"] == seen.role[0].tolist()
        if seen.importance is None:
            assert layer["importance"] is None
        for patch, token in enumerate(before if seen.importance is not None else ()):
            score = layer["importance"][patch]
            if token < 0:
                assert score is None
            else:
                assert math.isclose(score, seen.importance[0, token].item(), rel_tol=1e-5)
        before = layer["group"]


def test_a_page_asks_for_nothing_and_keeps_what_is_not_its_own_out_of_its_script(image):
    text = page([tell(*methods("TDM")[0][1:], image, "</script><b>")], "<i>cat & dog</i>")
    assert "&lt;i&gt;cat &amp; dog&lt;/i&gt;" in text
    assert text.count("</script>") == 2
    assert embedded(text)["methods"][0]["title"] == "</script><b>"
    assert not re.search(r'(src|href)="|@import|url\(|fetch\(|https?:', text)
    assert embedded(text)["picture"]["source"].startswith("data:image/jpeg;base64,")
    assert set(ROLES) == set(Role)


def test_an_animation_has_a_frame_for_each_block_and_dwells_on_those_that_reduce(tmp_path, image):
    story = tell(*methods("TDM")[0][1:], image)
    frames, times = animation([story])
    assert len(frames) == 7
    assert [time > 500 for time in times] == [True, False, True, False, True, True, True]
    path = save_animation(tmp_path / "a.gif", [story])
    with Image.open(path) as stored:
        assert (stored.n_frames, stored.info["loop"]) == (7, 0)
        shown = []
        for number in range(stored.n_frames):
            stored.seek(number)
            shown.append(stored.info["duration"])
    assert shown == times


def test_an_animation_of_noise_is_small(tmp_path):
    """What compresses worst, in the size that most models take, under a method that reduces in
    every block.
    """
    vit = make_vit(depth=12, img_size=224, patch_size=16)
    story = tell(tdm.attach(vit, tdm.ToMe(13)), torch.randn(3, 224, 224))
    assert save_animation(tmp_path / "a.gif", [story]).stat().st_size < 1e6


def test_dropped_patches_are_dark_and_the_others_as_they_were(image):
    story = tell(*methods("TopK")[0][1:], image)
    drawn, group = story.drawn(6), story.at(6).group
    picture = story.picture
    for i, j in np.ndindex(group.shape):
        cell = (slice(112 * i, 112 * i + 112), slice(112 * j, 112 * j + 112))
        expected = picture[cell] // 4 if group[i, j] < 0 else picture[cell]
        np.testing.assert_array_equal(drawn[cell], expected)
    np.testing.assert_array_equal(story.drawn(1), picture)  # the first that reduces is block 2
    assert (group < 0).sum() == 24 - story.tokens[-1]


def test_a_contact_sheet_grows_by_rows_of_at_most_four(image):
    stories = [tell(model, image, name) for name, model in methods("TDM", "ToMe", "TopK")]
    four, two = contact_sheet(stories), contact_sheet(stories[:1])
    assert four.height == two.height
    assert four.width > 1.8 * two.width
    six = contact_sheet([*stories, *stories[:2]])  # in two rows of three
    assert two.width < six.width < four.width
    assert six.height > 1.8 * four.height


def test_long_titles_are_set_smaller():
    assert fitting("TDM", 20, 300).size == 20
    font = fitting("a method with a very long list of its settings", 20, 300)
    assert font.size < 20
    assert font.getlength("a method with a very long list of its settings") <= 300


def test_files_of_each_format(tmp_path):
    photo = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(photo)
    ((_, model),) = methods("TDM")
    written = visualize_images([photo], model, tmp_path, side=64, formats=("png", "gif", "html"))
    assert [path.name for path in written] == [
        "cat_panels.png",
        "cat_tokens.gif",
        "cat_tokens.html",
    ]
    several = methods("TDM", "ToMe")
    written = visualize_methods([photo], several, tmp_path, formats=("html", "png", "gif"))
    assert {path.name for path in written} == {f"cat_methods.{f}" for f in ("png", "gif", "html")}
    assert all(path.exists() for path in written)
    titles = [m["title"] for m in embedded((tmp_path / "cat_methods.html").read_text())["methods"]]
    assert titles == ["TDM", "ToMe"]


def test_what_does_not_fit_together_is_refused(tmp_path, image):
    photo = tmp_path / "cat.png"
    Image.new("RGB", (40, 40)).save(photo)
    ((_, model),) = methods("TDM")
    deeper = tdm.attach(make_vit(depth=5), tdm.ToMe(2))
    with pytest.raises(ValueError, match="one depth"):
        animation([tell(model, image), tell(deeper, image)])
    with pytest.raises(ValueError, match="one depth"):
        page([tell(model, image), tell(deeper, image)], "both")
    with pytest.raises(ValueError, match="at least one method"):
        contact_sheet([])
    with pytest.raises(ValueError, match="formats must be one of 'png', 'gif', 'html', got 'mp4'"):
        visualize_images([photo], model, tmp_path / "out", formats=["mp4"])
    with pytest.raises(ValueError, match="nothing to write"):
        visualize_images([photo], model, tmp_path / "out", formats=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_shows_what_one_points_at(tmp_path, image):
    stories = [tell(model, image, name) for name, model in methods("TDM", "TopK")]
    script = """<script>
      const wait = setInterval(() => {
        if (means === null) return;
        clearInterval(wait);
        const canvas = document.querySelector("canvas"), found = [];
        const read = () => [...document.querySelectorAll("output")].map(o => o.textContent);
        for (let block = 0; block <= Number(slider.max); block++) {
          slider.value = block;
          slider.dispatchEvent(new Event("input"));
          for (let p = 0; p < rows * columns; p++) {
            const box = canvas.getBoundingClientRect();
            const clientX = box.left + (p % columns + .5) * box.width / columns;
            const clientY = box.top + (Math.floor(p / columns) + .5) * box.height / rows;
            canvas.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
            found.push(read());
          }
        }
        canvas.dispatchEvent(new PointerEvent("pointerleave"));
        found.push(read());
        for (const key of ["ArrowUp", "Escape"]) {
          canvas.dispatchEvent(new KeyboardEvent("keydown", {key}));
          found.push(read());
        }
        const told = document.createElement("pre");
        told.id = "found";
        told.textContent = JSON.stringify(found);
        document.body.append(told);
      }, 10);
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page(stories, "a title").replace("</body>", script), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert len(found) == 7 * 24 + 3
    for block in range(7):
        for patch in range(24):
            for story, told in zip(stories, found[24 * block + patch], strict=True):
                lines = [re.sub(r"importance \S+, ", "", line) for line in told.split("\n")]
                assert lines == expected_words(story, block, patch)
    assert found[-3] == found[-1] == ["", ""]
    assert found[-2][0].startswith("row 2, column 4 ")  # above the middle, where the keys begin


def expected_words(story, block, patch):
    """What a page says of a patch, found by another way."""
    number = max(n for n, layer in enumerate(story.layers) if layer.block <= block)
    groups = [layer.group.ravel() for layer in story.layers]
    token = groups[number][patch]
    first = f"row {patch // 6 + 1}, column {patch % 6 + 1}"
    while number and groups[number - 1][patch] < 0:  # it went before
        number -= 1
    layer, words = story.layers[number], []
    if token >= 0:
        size = int((groups[number] == token).sum())
        first += f" → token {token + 1}: {size} patch{'es' if size > 1 else ''}"
    if number:
        words.append(f"block {layer.block} {ROLES[Role(layer.role.ravel()[patch])]}")
    if layer.importance is not None:
        scores = layer.importance.ravel()
        entering = {groups[number - 1][p]: float(f"{s:.6g}") for p, s in enumerate(scores)}
        own = entering[groups[number - 1][patch]]
        entering = {t: s for t, s in entering.items() if t >= 0}
        rank = 1 + sum(score > own for score in entering.values())
        words.append(f"rank {rank} of {len(entering)}")
    return [first, *words]
