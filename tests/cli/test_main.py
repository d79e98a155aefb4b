"""The command line, called in-process as a user would call it."""

import subprocess
import sys

import pytest
import torch
import yaml

from tdm_lightning.cli import config_folder, main, named_configs, with_named_configs


def fit(tmp_path, *extra, command="fit"):
    arguments = [
        command,
        "--config",
        "quickstart",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.logger",
        "false",
        "--trainer.callbacks",
        "null",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_model_summary",
        "false",
        "--trainer.fast_dev_run",
        "2",
        "--model.warmup_epochs",
        "0",
        *extra,
    ]
    return main(arguments)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_commands_run(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = fit(tmp_path, command=command)
    assert cli.trainer.state.finished
    assert cli.model.classes == 10  # linked from the data
    assert cli.model.label_names[:2] == ["0", "1"]


def test_strategy_by_short_name(tmp_path):
    cli = fit(
        tmp_path,
        "--model.strategy=EViT",
        "--model.strategy.keep_rate=0.5",
        "--model.strategy.merger=TokenMerger",
    )
    strategy = cli.model.model.strategy
    assert type(strategy).__name__ == "EViT"
    assert strategy.keep_rate == 0.5
    assert strategy.merger is not None


def test_layers_combine(tmp_path):
    cli = fit(tmp_path, "--config", "strategies/evit", "--model.strategy.fuse=false")
    assert type(cli.model.model.strategy).__name__ == "EViT"
    assert cli.model.model.strategy.fuse is False


def test_environment_variables_set_what_the_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_FIT__MODEL__MIN_LR", "0.00002")
    assert fit(tmp_path).model.hparams.min_lr == 2e-5


def test_print_config(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstart", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["model"] == "vit_tiny_patch16_224"


def test_a_configuration_wins_over_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = [
        "--config=quickstart",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.limit_test_batches=1",
    ]
    main(
        [
            "fit",
            *shared,
            "--trainer.max_steps=1",
            "--trainer.max_epochs=1",
            "--trainer.limit_val_batches=1",
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.num_sanity_val_steps=0",
            "--model.warmup_epochs=0",
            "--model.strategy=EViT",
            "--model.strategy.keep_rate=0.6",
            "--trainer.callbacks=ModelCheckpoint",
            "--trainer.callbacks.dirpath=kept",
            "--trainer.callbacks.filename=last",
        ]
    )
    cli = main(["test", *shared, "--trainer.callbacks=null", "--ckpt_path=kept/last.ckpt"])
    assert type(cli.model.model.strategy).__name__ == "TDM"  # quickstart says so
    assert "EViT in last.ckpt" in capsys.readouterr().err


def test_rerun_overwrites_its_saved_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "fit",
        "--config=quickstart",
        "--trainer.callbacks=null",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--model.warmup_epochs=0",
    ]
    arguments.append("--trainer.logger.version=same")
    main(arguments)
    main([*arguments, "--model.lr=0.5"])
    saved = yaml.safe_load((tmp_path / "runs/quickstart/same/config.yaml").read_text())
    assert saved["model"]["lr"] == 0.5


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "tdm_lightning", "frobnicate"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "tdm: error: unknown command 'frobnicate'; the commands are fit, validate, test, predict,"
        " compare, export, models, rates, slim, visualize"
    ]


def test_overview_names_commands_and_configurations(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for word in ("fit", "test", "visualize", "quickstart", "strategies/tdm"):
        assert word in printed


def test_names_resolve_to_files_and_files_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        with_named_configs(["fit", "--config=quickstart"])[1]
        == f"--config={config_folder() / 'quickstart.yaml'}"
    )
    (tmp_path / "quickstart").write_text("{}")
    assert with_named_configs(["fit", "--config", "quickstart"])[2] == "quickstart"
    assert "strategies/evit_tdm" in named_configs()


def test_users_subclass_gets_the_same_command_line(tmp_path):
    from tdm_lightning import TokenReductionClassifier

    class Mine(TokenReductionClassifier):
        def __init__(self, twist: float = 1.0, **kwargs):
            super().__init__(**kwargs)
            self.twist = twist

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": {"twist": 3.0}}))
    arguments = [
        "fit",
        "--config=quickstart",
        f"--config={path}",
        "--trainer.fast_dev_run=1",
        "--model.warmup_epochs=0",
    ]
    cli = main([*arguments, "--trainer.callbacks=null", "--trainer.logger=false"], model_class=Mine)
    assert isinstance(cli.model, Mine)
    assert cli.model.twist == 3.0
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
