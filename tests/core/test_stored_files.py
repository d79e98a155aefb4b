"""Files of release 0.1.0 load for ever, and give what they gave."""

import gzip
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tdm_lightning as tdm
from tdm_lightning.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = ("tdm", "evit_merger", "dyvit", "svite_tdm", "own")


@pytest.fixture(autouse=True)
def _own_strategy(monkeypatch):
    """The user's module can be imported, and is."""
    monkeypatch.syspath_prepend(str(FIXTURES))
    if "own_strategy" not in sys.modules:
        __import__("own_strategy")


@pytest.fixture(params=STORED)
def stored(request):
    folder = FIXTURES / "0.1.0" / request.param
    return folder, load_file(folder / "expected.safetensors")


def unpacked(folder, tmp_path):
    path = tmp_path / "best.ckpt"
    path.write_bytes(gzip.decompress((folder / "best.ckpt.gz").read_bytes()))
    return path


def check(model, expected):
    with torch.no_grad():
        logits, trace = model.eval().trace(expected["images"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-6)
    assert torch.equal(trace.layers[0].assignment, expected["assignment"])


def test_checkpoints_load(stored, tmp_path):
    folder, expected = stored
    path = unpacked(folder, tmp_path)
    module = tdm.TokenReductionClassifier.load_from_checkpoint(
        path, map_location="cpu", weights_only=True
    )
    check(module.model, expected)


def test_hub_folders_load(stored):
    folder, expected = stored
    check(tdm.TokenReducedViT.from_pretrained(folder / "hub"), expected)


def test_saved_configurations_run(stored, tmp_path, monkeypatch):
    folder, expected = stored
    path = unpacked(folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    given = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(path)]
    quiet = ["--trainer.logger=false", "--trainer.limit_test_batches=1", "--trainer.callbacks=null"]
    cli = main(["test", *given, *quiet, "--model.weights=null"])
    check(cli.model.model, expected)
