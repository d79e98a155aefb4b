"""Every kind of local data goes through ``tdm fit``, and comes back as named predictions."""

import csv

import pytest
import torch
import yaml

from tdm_lightning.cli import main
from tests.helpers.localsets import (
    NAMES,
    make_arrow,
    make_image_folder,
    make_parquet,
    make_webdataset,
)

MAKERS = {
    "imagefolder": make_image_folder,
    "parquet": make_parquet,
    "arrow": make_arrow,
    "webdataset": make_webdataset,
}


def settings(tmp_path, root, kind, streaming):
    data = {
        "dataset": str(root),
        "streaming": streaming,
        "batch_size": 4,
        "num_workers": 0,
        "cache_dir": str(tmp_path / "cache"),
    }
    if kind == "webdataset":
        data |= {"image_column": "jpg", "label_column": "cls", "num_classes": 3}
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "logger": False,
        "enable_checkpointing": False,
    }
    model = {
        "model": "deit_tiny_patch16_224",
        "model_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2},
    }
    path = tmp_path / "local.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {**trainer, "enable_progress_bar": False, "enable_model_summary": False},
                "model": {**model, "warmup_epochs": 0},
                "data": data,
            }
        )
    )
    return path


@pytest.mark.usefixtures("no_wait_for_parquet")
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", MAKERS)
def test_fit(tmp_path, monkeypatch, kind, streaming):
    monkeypatch.chdir(tmp_path)
    path = settings(tmp_path, MAKERS[kind](tmp_path / "set"), kind, streaming)
    cli = main(["fit", "--config", str(path), "--config", "strategies/tdm"])
    assert cli.trainer.global_step == 2
    assert cli.model.classes == 3
    assert cli.model.label_names == (None if kind == "webdataset" else list(NAMES[:3]))
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


def test_predictions_are_written_with_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = settings(tmp_path, make_image_folder(tmp_path / "set"), "imagefolder", False)
    main(["predict", "--config", str(path), "--trainer.default_root_dir", str(tmp_path)])
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert {row["name"] for row in rows} <= set(NAMES[:3])
