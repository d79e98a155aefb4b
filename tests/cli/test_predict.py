"""``tdm predict`` on images of one's own, which nobody has labelled."""

import csv

import pytest
from lightning.pytorch import Trainer

import tdm_lightning as tdm
from tdm_lightning.cli import main
from tests.helpers.localsets import encode
from tests.helpers.trainers import QUIET

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of three classes, as ``tdm fit`` would have stored it."""
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    model = tdm.TokenReductionClassifier(
        "test_vit",
        tdm.TDM(layers=(1, 3)),
        num_classes=3,
        label_names=NAMES,
        model_kwargs={"img_size": 32},
    )
    trainer = Trainer(**QUIET, default_root_dir=path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def predict(folder, tmp_path, monkeypatch, *arguments):
    """The rows of the table."""
    monkeypatch.chdir(tmp_path)
    common = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--data.num_workers=0"]
    main(["predict", f"--data.dataset={folder}", *common, *arguments])
    with (tmp_path / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def make_folder(folder, *names):
    for label, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(label, 0))
    return folder


def test_a_folder_without_labels(checkpoint, tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "mine", "c.jpg", "a.jpg", "b.jpg")
    (folder / "b.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"):
        rows = predict(folder, tmp_path, monkeypatch, f"--ckpt_path={checkpoint}")
    assert [(row["image"], row["file"]) for row in rows] == [("0", "a.jpg"), ("2", "c.jpg")]
    assert {row["name"] for row in rows} <= set(NAMES)
    assert "Predicting" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["x.jpg"], ["ant/x.jpg"], ["test/x.jpg", "test/y.jpg"]])
def test_few_images_and_one_class(names, checkpoint, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "mine", *names)
    weights = ["--model.model=test_vit", "--model.model_kwargs={img_size: 32}"]
    weights += ["--model.strategy={class_path: TDM, init_args: {layers: [1, 3]}}"]
    weights += [f"--model.weights={checkpoint}", "--trainer.enable_progress_bar=false"]
    rows = predict(folder, tmp_path, monkeypatch, *weights)
    assert [row["file"] for row in rows] == names
    assert {row["name"] for row in rows} <= set(NAMES)
