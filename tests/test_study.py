"""``tdm study`` from the command line to the figures, on digits with a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from tdm_lightning.cli import main
from tdm_lightning.module import TokenReductionClassifier
from tdm_lightning.study.plan import METHODS, RATES, REPEATED_METHODS, REPEATED_RATES, grid_cells

SHAPE = {"img_size": 16, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "num_heads": 2}
DATA = {"dataset": "digits", "batch_size": 8, "eval_batch_size": 20, "num_workers": 0, "auto_augment": None, "re_prob": 0.0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint as ``tdm fit`` writes it."""
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(TokenReductionClassifier("deit_tiny_patch16_224", num_classes=10, model_kwargs=SHAPE))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def study(plain, tmp_path):
    def call(*extra, data=DATA):
        config = tmp_path / "data.yaml"
        config.write_text(yaml.safe_dump({"data": {"class_path": "tdm_lightning.ImageNetDataModule", "init_args": data}}))
        main(["study", "--config", str(config), f"--plain={plain}", f"--out={tmp_path / 'out'}", *extra])
        return tmp_path / "out"

    return call


def test_the_grid_of_the_plan():
    cells = grid_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    first = [cell for cell in cells if cell.seed == 1]
    assert len(first) == 1 + (len(METHODS) - 1) * len(RATES)
    assert len(cells) - len(first) == 2 * len(REPEATED_METHODS) * len(REPEATED_RATES)


def test_grid_runs_and_resumes(study):
    arguments = ["--methods=[TDM,DPC-KNN]", "--rates=[0.7,0.3]", "--train-images=16", "--eval-images=40"]
    out = study(*arguments)
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "grid").glob("*.json")}
    assert set(cells) == {
        "TDM-0.7-1",
        "TDM-0.3-1",
        "DPC-KNN-0.7-1",
        "DPC-KNN-0.3-1",
        *(f"{m}-{r}-{s}" for m in ("TDM", "DPC-KNN") for r in (0.7, 0.3) for s in (2, 3)),
    }
