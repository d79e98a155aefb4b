"""What the user gives wins over a checkpoint, which fills in the rest, in every command."""

import json
import os

import pytest
import torch
import yaml
from PIL import Image

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_weights
from tdm_lightning.cli import main

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "num_heads": 2, "depth": 3}
DATA = ["--data.dataset=digits", "--data.crop_pct=1.0", "--data.num_workers=0"]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.pin_memory=false",
    "--data.persistent_workers=false",
    "--data.batch_size=32",
    "--data.test_split=test",
]
LIMIT = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of TDM at 0.5 in block 1, trained for a step."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        fit(
            "--model.model=vit_tiny_patch16_224",
            f"--model.model_kwargs={json.dumps(SHAPE)}",
            "--model.strategy=TDM",
            "--model.strategy.keep_rate=0.5",
            "--model.strategy.layers=[1]",
            "--trainer.max_steps=1",
            "--trainer.callbacks=ModelCheckpoint",
            f"--trainer.callbacks.dirpath={folder}",
            "--trainer.callbacks.filename=best",
            "--trainer.callbacks.enable_version_counter=false",
        )
    finally:
        os.chdir(before)
    return folder / "best.ckpt"


def fit(*arguments):
    brief = ["--model.warmup_epochs=0", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    return main(["fit", *QUIET, *DATA, *brief, *arguments])


def run(command, trained, *arguments):
    if command == "fit":
        more = ["--trainer.max_steps=2", "--trainer.callbacks=null"]
        return fit(*more, f"--ckpt_path={trained}", *arguments)
    limit = f"--trainer.limit_{LIMIT[command]}_batches=1"
    return main([command, *QUIET, *DATA, limit, f"--ckpt_path={trained}", *arguments])


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def strategy_of(cli):
    return cli.model.model.strategy


every_command = pytest.mark.parametrize("command", LIMIT)


@every_command
def test_a_checkpoint_fills_in_what_is_not_given(command, trained, capsys):
    cli = run(command, trained)
    assert strategy_of(cli).config() == tdm.TDM(0.5, [1]).config()
    assert cli.model.hparams.model_kwargs == SHAPE
    assert "as given" not in capsys.readouterr().err


@every_command
@pytest.mark.parametrize("way", ["command line", "config file", "environment"])
def test_a_setting_of_the_strategy_wins(command, way, trained, capsys, tmp_path, monkeypatch):
    given = []
    if way == "command line":
        given = ["--model.strategy.keep_rate=0.3"]
    elif way == "config file":
        strategy = {"class_path": "tdm_lightning.TDM", "init_args": {"keep_rate": 0.3}}
        (tmp_path / "given.yaml").write_text(yaml.safe_dump({"model": {"strategy": strategy}}))
        given = ["--config=given.yaml"]
    else:
        value = json.dumps({"class_path": "TDM", "init_args": {"keep_rate": 0.3}})
        monkeypatch.setenv(f"PL_{command.upper()}__MODEL__STRATEGY", value)
    strategy = strategy_of(run(command, trained, *given))
    assert strategy.keep_rate == 0.3
    if way != "environment":  # a whole value there, so nothing is left to fill in
        assert strategy.layers == (1,)
    said = [line for line in capsys.readouterr().err.splitlines() if "as given" in line]
    assert len(said) == 1
    assert "model.strategy.keep_rate is 0.3 as given, 0.5 in best.ckpt" in said[0]


@every_command
def test_a_strategy_of_another_class_takes_nothing_of_the_stored_one(command, trained, capsys):
    given = ["--model.strategy=EViT", "--model.strategy.layers=[0]"]
    strategy = strategy_of(run(command, trained, *given))
    assert strategy.config() == tdm.EViT(layers=[0]).config()
    assert "tdm_lightning.EViT as given, tdm_lightning.TDM in best.ckpt" in capsys.readouterr().err


@every_command
def test_weights_that_do_not_fit_are_an_error(command, trained):
    with pytest.raises(tdm.errors.FileError, match=r"do not fit.* is \(.*16.* in the file and"):
        run(command, trained, "--model.model_kwargs.embed_dim=32")


def test_learned_layers_that_a_checkpoint_does_not_hold_are_an_error(trained):
    given = ["--model.strategy=DyViT", "--model.strategy.layers=[1]"]
    with pytest.raises(
        tdm.errors.FileError, match=r"strategy\.score_predictor.* is not in the file"
    ):
        run("test", trained, *given)


def test_the_command_line_wins_over_a_file_and_that_over_the_checkpoint(trained, tmp_path):
    strategy = {"class_path": "TDM", "init_args": {"keep_rate": 0.3, "layers": [0]}}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"model": {"strategy": strategy}}))
    given = ["--config=given.yaml", "--model.strategy.keep_rate=0.9"]
    found = strategy_of(run("test", trained, *given))
    assert (found.keep_rate, found.layers) == (0.9, (0,))


def test_a_checkpoint_that_is_none(tmp_path):
    with pytest.raises(tdm.errors.FileError, match="there is no checkpoint 'nowhere.ckpt'"):
        run("test", "nowhere.ckpt")
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(tdm.errors.FileError, match=r"no checkpoint of `tdm fit`.*--model.weights"):
        run("test", tmp_path / "other.pth")


# The library's own commands take a checkpoint of fit as weights -------------------------------


@pytest.fixture
def photo(tmp_path):
    Image.new("L", (8, 8), 99).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_export(trained, tmp_path, capsys):
    main(["export", f"--weights={trained}", "--format=hub", "--out=own"])
    assert "as given" not in capsys.readouterr().err
    own = tdm.TokenReducedViT.from_pretrained("own")
    assert own.strategy.config() == tdm.TDM(0.5, [1]).config()
    main(["export", f"--weights={trained}", "--strategy.keep_rate=0.3", "--format=hub", "--out=b"])
    assert "strategy.keep_rate is 0.3 as given, 0.5 in" in capsys.readouterr().err
    assert tdm.TokenReducedViT.from_pretrained("b").strategy.keep_rate == 0.3
    arguments = ["export", f"--weights={trained}", "--strategy=EViT", "--strategy.layers=[0]"]
    main([*arguments, "--format=hub", "--out=c"])
    found = tdm.TokenReducedViT.from_pretrained("c")
    assert found.strategy.config() == tdm.EViT(layers=[0]).config()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(found.vit(images), own.vit(images))
    with pytest.raises(tdm.errors.FileError, match="other shape|do not fit|shape"):
        main([*arguments, "--model_kwargs.embed_dim=32", "--format=hub", "--out=d"])
    assert not (tmp_path / "d").exists()


def test_visualize(trained, photo, capsys):
    (own,) = main(["visualize", photo, f"--weights={trained}", "--out=own"])
    assert "as given" not in capsys.readouterr().err
    given = ["--strategy.keep_rate=0.2", "--out=other"]
    (other,) = main(["visualize", photo, f"--weights={trained}", *given])
    assert "strategy.keep_rate is 0.2 as given, 0.5 in" in capsys.readouterr().err
    assert own.read_bytes() != other.read_bytes()


def test_slim(trained, capsys):
    arguments = ["slim", f"--weights={trained}", *DATA, "--counts=[12,8,0]", "--images=8"]
    slimmed = main(arguments)
    assert slimmed.model.strategy.token_counts == (12, 8, 0)
    assert slimmed.model.vit.embed_dim == 16
    with pytest.raises(tdm.errors.FileError, match="shape|fit"):
        main([*arguments, "--model_kwargs.embed_dim=32"])


def test_weights_go_by_one_name_everywhere(trained):
    """A checkpoint of fit, a folder, a file: the same weights."""
    main(["export", f"--weights={trained}", "--format=hub", "--out=folder"])
    from_file = tdm.TokenReducedViT.from_pretrained("folder")
    for weights in (str(trained), "folder"):
        module = tdm.TokenReductionClassifier(
            "vit_tiny_patch16_224",
            tdm.TDM(0.5, [1]),
            num_classes=10,
            model_kwargs=SHAPE,
            weights=weights,
        )
        for name, value in from_file.state_dict().items():
            assert torch.equal(module.model.state_dict()[name], value)
    with pytest.raises(tdm.errors.FileError, match="no weights at 'nowhere.pth'"):
        load_weights(from_file, "nowhere.pth")


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        (["fit", "--model.pretrained", "true"], "--model.weights true"),
        (["fit", "--model.checkpoint=x.pth"], "--model.weights"),
        (["export", "--ckpt_path=x.ckpt"], "--weights"),
        (["visualize", "a.png", "--from_pretrained=x"], "--weights"),
        (["compare", "--ckpt=x"], "--weights"),
    ],
)
def test_old_names_of_options_tell_the_new_one(arguments, new, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is {new} now" in line
