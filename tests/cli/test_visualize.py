"""``tdm visualize`` as a user calls it."""

import re

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


def names(written):
    return [path.name for path in written]


@pytest.mark.parametrize(
    ("given", "endings"),
    [
        (["--formats", "gif"], ["tokens.gif"]),
        (["--formats", "html", "png"], ["panels.png", "tokens.html"]),
        (["--formats=[png,gif]"], ["panels.png", "tokens.gif"]),
    ],
)
def test_formats_one_or_several(photo, tmp_path, capsys, given, endings):
    written = call(photo, tmp_path, "--random_weights=true", *given)
    assert names(written) == [f"photo_{ending}" for ending in endings]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]


def test_a_format_that_there_is_not(photo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(photo, tmp_path, "--random_weights=true", "--formats", "mp4")
    assert "mp4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_methods_side_by_side(photo, tmp_path):
    several = ["--random_weights=true", "--strategies+=TDM", "--strategies+=ToMe"]
    written = call(photo, tmp_path, *several, "--formats", "png", "html")
    assert names(written) == ["photo_methods.png", "photo_methods.html"]
    text = written[1].read_text(encoding="utf-8")
    assert "TDM (keep_rate=0.7)" in text
    assert "ToMe (r=13)" in text


@pytest.mark.slow
def test_methods_at_a_budget(photo, tmp_path):
    given = ["--random_weights=true", "--strategies+=TopK", "--match_gmacs=0.012"]
    (written,) = call(photo, tmp_path, *given, "--formats=html")
    (rate,) = re.findall(r"TopK \(keep_rate=(0\.\d+)\)", written.read_text(encoding="utf-8"))
    vit = timm.create_model(
        "deit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, num_heads=2
    )
    assert tdm.solve_keep_rate(vit, tdm.TopK(), gmacs=0.012) == float(rate)


def test_a_method_that_these_weights_are_not_of(photo, tmp_path):
    vit = timm.create_model(
        "deit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, num_heads=2
    )
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="DyViT cannot be drawn with these weights"):
        call(photo, tmp_path, f"--weights={tmp_path / 'vit.pth'}", "--strategies+=DyViT")
    assert not (tmp_path / "out").exists()


def test_a_budget_is_for_several_methods(photo, tmp_path):
    with pytest.raises(ValueError, match="match_gmacs is for several methods"):
        call(photo, tmp_path, "--random_weights=true", "--match_gmacs=0.1")
