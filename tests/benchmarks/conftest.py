"""A small study that several files look at."""

import pytest
import torch
import yaml

from benchmarks.runner import run
from benchmarks.study.__main__ import study as study_command
from tdm_lightning.training.module import TokenReductionClassifier
from tests.helpers.studies import DATA, NAME, SHAPE, SMALL


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """As ``tdm fit`` writes it."""
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    trainer = Trainer(accelerator="cpu", barebones=True)
    trainer.strategy.connect(TokenReductionClassifier(NAME, num_classes=10, model_kwargs=SHAPE))
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="session")
def study(checkpoint, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "data.yaml"
    config.write_text(
        yaml.safe_dump(
            {"data": {"class_path": "tdm_lightning.ImageNetDataModule", "init_args": DATA}}
        )
    )

    def call(out, *extra):
        return run(
            study_command,
            ["--config", str(config), f"--plain={checkpoint}", f"--out={out}", *extra],
        )

    return call


@pytest.fixture(scope="session")
def finished(study, tmp_path_factory):
    """The folder of a small grid."""
    out = tmp_path_factory.mktemp("out")
    study(out, "--part=grid", *SMALL)
    return out
