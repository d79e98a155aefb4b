"""The picture of the rounds."""

import pytest
import timm
import torch
from PIL import Image

from benchmarks.rounds.__main__ import rounds
from benchmarks.runner import run


def test_a_row_for_each_photograph(tmp_path):
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 3}
    vit = timm.create_model("deit_tiny_patch16_224", **shape)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    path = run(
        rounds,
        [
            "--model=deit_tiny_patch16_224",
            f"--model_kwargs={shape}",
            f"--weights={tmp_path / 'vit.pth'}",
            "--photographs=[flower]",
            "--count=2",
            f"--out={tmp_path / 'rounds.png'}",
        ],
    )
    picture = Image.open(path)
    assert 3 * 224 < picture.width < 4 * 224
    assert 224 < picture.height < 2 * 224


def test_random_weights_are_refused():
    with pytest.raises(ValueError, match="untrained"):
        run(rounds, [])
