"""``tdm visualize`` as a user calls it."""

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image

import tdm_lightning as tdm
from tdm_lightning.cli import main

TINY = '{"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 2}'


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    return str(path)


def call(photo, tmp_path, *extra, more=()):
    out = tmp_path / "out"
    return main(
        [
            "visualize",
            photo,
            *more,
            "--model=deit_tiny_patch16_224",
            f"--model_kwargs={TINY}",
            f"--out={out}",
            *extra,
        ]
    )


def test_random_weights_only_if_asked_for(photo, tmp_path):
    with pytest.raises(ValueError, match="untrained"):
        call(photo, tmp_path)
    assert not (tmp_path / "out").exists()
    (written,) = call(photo, tmp_path, "--random_weights=true")
    with Image.open(written) as picture:
        assert min(picture.size) >= 448


def test_strategy_and_weights_from_the_command_line(photo, tmp_path):
    vit = timm.create_model(
        "deit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, num_heads=2
    )
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    extra = [f"--weights={tmp_path / 'vit.pth'}", "--strategy=EViT", "--strategy.keep_rate=0.5"]
    (written,) = call(photo, tmp_path, *extra)
    assert written.exists()


def test_unreadable_image_writes_nothing(photo, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png"):
        call(photo, tmp_path, "--random_weights=true", more=[str(tmp_path / "missing.png")])
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_written(photo, tmp_path):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(ValueError, match="cannot write"):
        call(photo, tmp_path, "--random_weights=true")


def test_a_checkpoint_of_fit(photo, tmp_path):
    """The model, its weights and its strategy come from the run, and another strategy can be tried
    on them.
    """
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
    module = tdm.TokenReductionClassifier(
        "deit_tiny_patch16_224", tdm.TDM(0.5), num_classes=3, model_kwargs=shape
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    (own,) = main(
        ["visualize", photo, f"--weights={tmp_path / 'run.ckpt'}", f"--out={tmp_path / 'own'}"]
    )
    (other,) = main(
        [
            "visualize",
            photo,
            f"--weights={tmp_path / 'run.ckpt'}",
            "--strategy=ToMe",
            f"--out={tmp_path / 'other'}",
        ]
    )
    assert own.read_bytes() != other.read_bytes()
