"""Scenes: what they show, that splits share nothing, and the model that is trained on them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

import tdm_lightning as tdm
from benchmarks.runner import run
from benchmarks.scenes.__main__ import scenes
from benchmarks.scenes.draw import SIDE, Clutter, draw_scene
from benchmarks.scenes.split import Garments, draw_scenes, read_garments
from benchmarks.scenes.train import train
from benchmarks.study.plain import Plain


def write_idx(path, array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """As Fashion-MNIST's files, every picture of one grey that tells its split."""
    folder = tmp_path_factory.mktemp("fashion")
    for prefix, count, grey in (("train", 5_020, 100), ("t10k", 20, 220)):
        pictures = np.full((count, 28, 28), grey, dtype=np.uint8)
        pictures[:, :4] = pictures[:, -4:] = 0
        write_idx(folder / f"{prefix}-images-idx3-ubyte", pictures)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return str(folder)


def test_a_scene_shows_the_whole_garment_in_front():
    garment, other = np.full((28, 28), 200, np.uint8), np.full((28, 28), 90, np.uint8)
    garment[:5] = 0
    quiet = Clutter(grain=0.0)
    for seed in range(5):
        scene, mask = draw_scene(garment, [other] * 4, np.random.default_rng(seed), quiet)
        assert scene.shape == mask.shape == (SIDE, SIDE)
        assert scene.dtype == np.uint8
        rows, columns = np.nonzero(mask == 255)
        side = np.ptp(columns) + 1
        assert 0.3 * SIDE <= side <= 0.82 * SIDE
        assert np.ptp(rows) + 1 < side  # the black part of the picture is left out
        assert (scene[mask == 255] > 190).all()
        again, _ = draw_scene(garment, [other] * 4, np.random.default_rng(seed), quiet)
        assert np.array_equal(scene, again)


def test_pieces_are_of_other_classes():
    pictures = np.stack([np.full((28, 28), 40 + 20 * label, np.uint8) for label in range(10)])
    garments = Garments(pictures, np.arange(10), 0)
    drawn = list(draw_scenes(garments, 0, 20))
    assert sorted(scene.label for scene in drawn[:10]) == list(range(10))
    assert len({scene.image.tobytes() for scene in drawn}) == 20
    later = list(draw_scenes(garments, 15, 5))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(drawn[15:], later, strict=True))


def test_splits_show_other_garments(fashion, tmp_path):
    parts = read_garments(fashion)
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "train": 20,
        "validation": 5_000,
        "test": 20,
    }
    assert parts["train"].pictures.max() == 100
    assert parts["test"].pictures.max() == 220
    arguments = [f"--garments={fashion}", f"--out={tmp_path}", "--train=8", "--validation=4"]
    written = run(scenes, [*arguments, "--test=4"])
    assert [path.name for path in written] == [
        "train.parquet",
        "validation.parquet",
        "test.parquet",
    ]
    data = tdm.ImageNetDataModule(
        str(tmp_path),
        val_split="validation",
        test_split="test",
        model="vit_tiny_patch16_224",
        model_kwargs={"img_size": SIDE, "patch_size": 4, "in_chans": 1},
        batch_size=4,
        num_workers=0,
    )
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 1, SIDE, SIDE)
    assert set(labels.tolist()) <= set(range(10))


def test_too_few_garments_are_refused(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="3 training images; more than 5000 are needed"):
        read_garments(str(tmp_path))


def test_training_writes_a_plain_model_and_goes_on(fashion, tmp_path):
    arguments = [f"--garments={fashion}", "--width=32", "--batch_size=4", "--steps=0"]
    first = run(train, [*arguments, "--coarse_steps=2", f"--out={tmp_path / 'one'}"])
    stored = torch.load(first, weights_only=True)
    assert stored["hyper_parameters"]["model_kwargs"]["img_size"] == SIDE // 2
    arguments[-1] = "--steps=1"
    path = run(
        train, [*arguments, "--coarse_steps=0", f"--start={first}", f"--out={tmp_path / 'two'}"]
    )
    assert all(
        value.dtype == torch.float16
        for value in torch.load(path, weights_only=True)["state_dict"].values()
    )
    plain = Plain.read(str(path))
    module = plain.under(tdm.WardTDM(0.7)).eval()
    assert module(torch.randn(2, 1, SIDE, SIDE)).shape == (2, 10)
