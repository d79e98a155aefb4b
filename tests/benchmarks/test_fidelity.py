"""Fidelity to the unreduced model."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import tdm_lightning as tdm
from benchmarks.fidelity import table
from benchmarks.fidelity.__main__ import fidelity
from benchmarks.fidelity.measure import distances, observed
from benchmarks.fidelity.photographs import crops, photographs
from benchmarks.fidelity.run import training_free
from benchmarks.runner import run

SHAPE = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "depth": 12,
    "num_classes": 0,
}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **SHAPE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48)


def test_the_plain_model_is_true_to_itself(vit, images):
    plain = observed(vit, tdm.Strategy(), images, batch_size=2)
    assert plain[0].shape == (3, 16)
    assert plain[1].shape == (3, 36, 16)
    torch.testing.assert_close(plain[0], vit(images))
    torch.testing.assert_close(plain[1], vit.forward_features(images)[:, 1:])
    for values in distances(plain, plain):
        assert values == pytest.approx([0.0] * 3, abs=1e-6)


def test_methods_that_need_training_or_labels_are_left_out():
    names = {method.name for method in training_free()}
    assert {"WardTDM", "TDM", "ToMe", "MaMe", "Random"} <= names
    assert not {"Plain", "DyViT", "SPViT+TDM", "Evo-ViT", "PS-ViT"} & names


def test_dropped_patches_count_as_far_away(vit, images):
    plain = observed(vit, tdm.Strategy(), images)
    reduced = observed(vit, tdm.TopK(0.5, layers=(3,)), images)
    dropped = reduced[1].abs().sum(-1) == 0
    assert dropped.sum(1).tolist() == [18, 18, 18]
    _, dense = distances(plain, reduced)
    for image, found in enumerate(dense):
        kept = ~dropped[image]
        by_hand = F.cosine_similarity(plain[1][image, kept], reduced[1][image, kept], dim=-1)
        assert found == pytest.approx(1 - by_hand.sum().item() / 36, abs=1e-6)


def test_crops_depend_on_their_seed_alone():
    pytest.importorskip("skimage")
    photos = photographs()
    assert len(photos) >= 8
    config = {"input_size": (3, 48, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    first, again, other = (crops(photos, 10, seed, config) for seed in (1, 1, 2))
    assert first.shape == (10, 3, 48, 48)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[8])  # another crop of the same photograph


def test_command(tmp_path, capsys):
    pytest.importorskip("skimage")
    weights = timm.create_model("deit_tiny_patch16_224", **SHAPE).state_dict()
    torch.save({"model": weights}, tmp_path / "vit.pth")
    shape = "{" + ", ".join(f"{key}: {value}" for key, value in SHAPE.items()) + "}"
    arguments = [
        "--model=deit_tiny_patch16_224",
        f"--model_kwargs={shape}",
        "--methods=[TDM]",
        "--rates=[0.7]",
        "--crops=8",
        f"--weights={tmp_path / 'vit.pth'}",
        f"--out={tmp_path}",
    ]
    run(fidelity, [*arguments, "--draws=[1]"])
    first = (tmp_path / "fidelity.csv").read_text()
    run(fidelity, [*arguments, "--draws=[1,2]"])  # goes on
    assert (tmp_path / "fidelity.csv").read_text().startswith(first)
    found = table.read(tmp_path / "fidelity.csv")
    assert [(one.method, one.draw) for one in found] == [("TDM", 1), ("TDM", 2)]
    assert all(len(one.pooled) == len(one.dense) == 8 for one in found)
    text = (tmp_path / "fidelity.md").read_text()
    mean = sum(sum(one.dense) for one in found if one.method == "TDM") / 16
    assert f"| TDM | {100 * mean:.2f} (" in text.partition("patch features")[2]
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
    assert Image.open(tmp_path / "panels.png").height > 8 * 448


def test_random_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="untrained"):
        run(fidelity, [f"--out={tmp_path}"])
