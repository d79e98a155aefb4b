"""Drawings of patch groups: pure functions first, then whole sheets and their files."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.core import LayerTrace, Role, Trace
from tdm_lightning.ops import cluster_density_peaks
from tdm_lightning.visualize import arrange, panels, save_panels, strip, visualize_images
from tdm_lightning.visualize.draw import (
    BLANK,
    WHITE,
    fill_groups,
    mask_patches,
    outline,
    tint_groups,
    upsample,
)
from tdm_lightning.visualize.images import data_config, prepare, to_picture
from tdm_lightning.visualize.panels import inattentive


def noise(height, width):
    return np.random.default_rng(0).integers(0, 250, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=3
    )
    return tdm.attach(vit, tdm.TDM(0.5, layers=(1, 3, 4)))


@pytest.mark.parametrize("size", [(40, 60), (41, 64), (5, 4)])
def test_spread_gives_every_pixel_its_patch(size):
    values = np.arange(20).reshape(5, 4)
    expected = [
        [values[y * 5 // size[0], x * 4 // size[1]] for x in range(size[1])] for y in range(size[0])
    ]
    assert upsample(values, size).tolist() == expected


def test_masked_patches_are_blank_and_the_others_untouched():
    picture, masked = noise(20, 40), np.array([[True, False], [False, False]])
    out = mask_patches(picture, masked)
    assert (out[:10, :20] == BLANK).all()
    np.testing.assert_array_equal(out[10:], picture[10:])
    np.testing.assert_array_equal(out[:10, 20:], picture[:10, 20:])


def test_groups_take_their_mean_colour_and_singles_show_the_picture():
    picture = noise(40, 60)
    group = np.array([[0, 0, 1], [2, 0, -1]])
    out = fill_groups(picture, group)
    members = np.concatenate([picture[:20, :40].reshape(-1, 3), picture[20:, 20:40].reshape(-1, 3)])
    inside = np.zeros((40, 60), dtype=bool)
    inside[3:17, 3:17] = inside[3:17, 23:37] = inside[23:37, 23:37] = True  # off the borders
    assert (out[inside] == np.round(members.mean(0))).all()
    np.testing.assert_array_equal(out[3:17, 43:57], picture[3:17, 43:57])
    np.testing.assert_array_equal(out[23:37, 3:17], picture[23:37, 3:17])
    assert (out[23:37, 43:57] == BLANK).all()
    assert (out[5, 20] != WHITE).any(), "no border inside a group"
    assert (out[5, 40] == WHITE).all(), "a border between groups"


def test_borders_only_where_a_bordered_patch_meets_another_group():
    group, bordered = (
        np.array([[0, 0, 1, 2], [3, 4, 1, 5]]),
        np.array([[True, True, True, False], [False, False, True, False]]),
    )
    out = outline(np.zeros((20, 40, 3), dtype=np.uint8), group, bordered)
    white = (out == 255).all(-1)
    vertical = {(i, j): white[10 * i + 4, 10 * j] for i in range(2) for j in (1, 2, 3)}
    assert vertical == {
        (0, 1): False,
        (0, 2): True,
        (0, 3): True,
        (1, 1): False,
        (1, 2): True,
        (1, 3): True,
    }
    assert white[10, [4, 14]].all()
    assert not white[10, [25, 35]].any()


def test_parked_patches_fade():
    picture, group = np.full((10, 20, 3), 90, dtype=np.uint8), np.array([[0, 1]])
    out = fill_groups(picture, group, pale=np.array([[False, True]]))
    assert (out[:, :10] == 90).all()
    assert (out[:, 10:] == (90 + 2 * 255) // 3).all()


def test_clusters_have_one_colour_each():
    group = np.arange(12).reshape(3, 4) // 2
    out = tint_groups(np.zeros((30, 40, 3), dtype=np.uint8), group)
    colours = [tuple(out[10 * i + 5, 10 * j + 5]) for i in range(3) for j in range(4)]
    assert [colours[k] for k in range(0, 12, 2)] == [colours[k] for k in range(1, 12, 2)]
    assert len(set(colours)) == 6


def test_inattentive_patches_stay_so_and_parked_ones_come_back():
    def layer(index, *roles):
        return LayerTrace(index, None, torch.zeros(1, 4, dtype=torch.int64), torch.tensor([roles]))

    trace = Trace(
        [],
        [
            layer(0, Role.KEPT, Role.CLUSTERED, Role.PARKED, Role.MATCHED),
            layer(1, Role.DROPPED, Role.KEPT, Role.KEPT, Role.PARKED),
        ],
    )
    assert inattentive(trace, 0, (2, 2)).tolist() == [[False, True], [True, False]]
    assert inattentive(trace, -1, (2, 2)).tolist() == [[True, True], [False, True]]


def test_panels_of_an_oblong_image_agree_with_the_trace(model):
    image = torch.randn(3, 32, 48)
    drawn = panels(model, image)
    assert list(drawn) == [
        "original",
        "importance",
        "diversity",
        "reduced",
        "block 2",
        "block 4",
        "block 5",
    ]
    assert {panel.size for panel in drawn.values()} == {(672, 448)}
    pixels = {name: np.asarray(panel) for name, panel in drawn.items()}
    np.testing.assert_array_equal(pixels["reduced"], pixels["block 5"])

    last = model.eval().trace(image.unsqueeze(0))[1].layers[-1]
    group = last.assignment.reshape(4, 6)
    members = torch.bincount(group.flatten())
    for i in range(4):
        for j in range(6):
            cell = (slice(112 * i + 10, 112 * i + 102), slice(112 * j + 10, 112 * j + 102))
            assert (pixels["reduced"][cell] == pixels["original"][cell]).all() == (
                members[group[i, j]] == 1
            ).item()
    masked = (pixels["importance"][56::112, 56::112] == BLANK).all(-1)
    clustered = [
        layer.role == Role.CLUSTERED for layer in model.trace(image.unsqueeze(0))[1].layers
    ]
    assert masked.tolist() == torch.stack(clustered).any(0).reshape(4, 6).tolist()


def test_diversity_shows_as_many_clusters_as_tokens_are_left(model):
    image = torch.randn(3, 32, 48)
    drawn = np.asarray(panels(model, image, layer=0)["diversity"])
    with torch.no_grad():
        (features,) = model.vit.eval().forward_intermediates(
            image.unsqueeze(0), indices=[1], output_fmt="NLC", intermediates_only=True
        )
    label, _ = cluster_density_peaks(features, 12)
    picture = to_picture(image, *(data_config(model)[name] for name in ("mean", "std")))
    np.testing.assert_array_equal(drawn, tint_groups(picture, label[0].reshape(4, 6).numpy()))
    assert label.unique().numel() == 12


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        (
            tdm.EViT(0.5, (1, 3), fuse=False),
            ["original", "importance", "diversity", "reduced", "block 2", "block 4"],
        ),
        (tdm.ToMe(3), ["original", "diversity", "reduced", *(f"block {k}" for k in range(1, 7))]),
        (
            tdm.EvoViT(0.5, layers=(2,)),
            ["original", "importance", "diversity", "reduced", "block 3"],
        ),
        (tdm.TDM(1.0, layers=(1,)), ["original"]),
    ],
    ids=["dropping", "without importance", "parking", "reducing nothing"],
)
def test_panels_of_other_methods(strategy, names):
    vit = VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=6,
        num_heads=2,
        num_classes=3,
        global_pool="avg",
    )
    assert list(panels(tdm.attach(vit, strategy), torch.randn(3, 32, 32))) == names


def test_drawing_leaves_modes_and_gradients_alone(model):
    model.train()
    model.vit.blocks[2].eval()
    panels(model, torch.randn(3, 32, 48))
    assert model.training
    assert model.vit.blocks[1].training
    assert not model.vit.blocks[2].training
    assert all(p.grad is None for p in model.parameters())


def test_wrong_models_and_layers(model):
    with pytest.raises(TypeError, match="attach"):
        panels(model.vit, torch.randn(3, 32, 48))
    with pytest.raises(ValueError, match="3 reducing layers, got 3"):
        panels(model, torch.randn(3, 32, 48), layer=3)
    with pytest.raises(ValueError, match="32×48"):
        panels(model, torch.randn(3, 32, 32))


def test_pictures_undo_the_normalisation():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64)
    photo = Image.fromarray(noise(6, 5)).resize((700, 900), Image.Resampling.BICUBIC)
    config = data_config(vit)
    assert config["input_size"] == (3, 64, 64)
    image, view = prepare(photo, config)
    again = to_picture(image, config["mean"], config["std"])
    assert view.shape == again.shape == (448, 448, 3)
    assert np.abs(view.astype(int) - again.astype(int)).mean() < 6  # the same view, sharper


def test_grey_models_get_grey_images():
    vit = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=3, num_heads=2, num_classes=3
    )
    vit.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    config = data_config(vit)
    assert config["mean"] == pytest.approx((0.2,))
    digit = torch.linspace(-0.4, 1.6, 64).reshape(1, 8, 8)
    picture = to_picture(digit, config["mean"], config["std"])
    assert picture.shape == (448, 448, 3)
    assert (picture[::56, ::56] == picture[28::56, 28::56]).all(), "pixels stay sharp squares"
    assert (picture[0, 0] == 0).all()
    assert (picture[-1, -1] == 255).all()
    drawn = panels(tdm.attach(vit, tdm.TDM(0.5, layers=(1,))), Image.fromarray(noise(20, 20)))
    pixels = np.asarray(drawn["original"])
    assert (pixels == pixels[..., :1]).all()


def test_sheets_name_the_panels_of_each_new_row():
    panel = Image.new("RGB", (60, 40))
    one, two = arrange([{"a": panel}], side=40), arrange([{"a": panel}, {"a": panel}], side=40)
    other = arrange([{"a": panel}, {"b": panel, "c": panel}], side=40)
    assert one.width == two.width < other.width
    assert other.height > two.height
    assert arrange([{"a": panel}], side=80).width > one.width + 50
    with pytest.raises(ValueError, match="no panels"):
        arrange([])


def test_strip_reads_the_first_image(model):
    _, trace = model.eval().trace(torch.randn(2, 3, 32, 48))
    assert list(strip(noise(64, 96), trace, (4, 6))) == ["block 2", "block 4", "block 5"]


def test_files_of_images(tmp_path, model):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(noise(50, 80)).save(tmp_path / folder / "cat.png")
    paths = [tmp_path / "a" / "cat.png", str(tmp_path / "b" / "cat.png")]
    written = visualize_images(paths, model, tmp_path / "new" / "out", side=64)
    assert [path.name for path in written] == ["cat_panels.png", "cat-2_panels.png"]
    assert Image.open(written[0]).width > 4 * 96


def test_images_together_are_rows_of_one_file(tmp_path, model):
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    for path in paths:
        Image.fromarray(noise(50, 80)).save(path)
    (written,) = visualize_images(paths, model, tmp_path, side=64, together=True)
    assert written.name == "panels.png"
    sheet = Image.open(written)
    assert 3 * 64 < sheet.height < 4 * 64  # no row of blocks
    assert sheet.width > 4 * 96


def test_fewer_colours_make_smaller_files(tmp_path):
    row = {"noise": Image.fromarray(noise(64, 64))}
    full, few = (
        save_panels(tmp_path / f"{n}.png", [row], side=64, colours=n).stat().st_size
        for n in (None, 16)
    )
    assert few < full / 2


@pytest.mark.parametrize(
    "content", [None, b"this is text", b"\x89PNG\r\n\x1a\n"], ids=["missing", "text", "cut off"]
)
def test_unreadable_images_are_refused_before_anything_is_written(tmp_path, model, content):
    Image.fromarray(noise(50, 80)).save(tmp_path / "good.png")
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*bad\.png"):
        visualize_images([tmp_path / "good.png", tmp_path / "bad.png"], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, model):
    Image.fromarray(noise(50, 80)).save(tmp_path / "good.png")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to the folder"):
        visualize_images([tmp_path / "good.png"], model, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="no image"):
        visualize_images([], model, tmp_path / "out")
