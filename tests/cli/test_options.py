"""Names of settings, as the sources tell them."""

from importlib import import_module
from inspect import signature

import pytest
from lightning.pytorch.cli import LightningCLI

from tdm_lightning.cli.app import COMMANDS
from tdm_lightning.cli.mistakes import UsageError
from tdm_lightning.cli.options import check_options, function_options, trainer_options
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.training import TokenReductionClassifier


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_they_are_those_of_the_parser(command):
    parts = {"model": TokenReductionClassifier, "data": ImageNetDataModule}
    cli = LightningCLI(*parts.values(), run=False, args=[], auto_configure_optimizers=False)
    keys = cli.parser.get_defaults().keys()
    names = {name for name in keys if name.count(".") < 2}
    assert len(names) > 80
    assert trainer_options(command).keys() >= names - {"model", "data", "trainer"}
    assert "ckpt_path" in trainer_options(command)
    assert "datamodule" not in trainer_options(command)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda name: name[:3])
def test_those_of_our_own_commands_are_arguments(command):
    module, name, _ = COMMANDS[command]
    arguments = signature(getattr(import_module(module), name)).parameters
    assert function_options(module, name).keys() == {"config", "help", "print_config", *arguments}


@pytest.mark.parametrize(
    "argument",
    [
        "--model.lr=3",
        "--model.strategy.merger.density=knn",
        "--model.strategy+=TDM",
        "--trainer.max_epoch=3",  # argparse takes the beginning of a name
        "--trainer.callbacks.help",
        "--model",
        "--print_config",
        "-c",
        "--config={model: {lr: 3, strategy: {class_path: TDM}}, trainer: {callbacks+: []}}",
        "--config={model: {pretrained: true}}",  # of 0.1.0
    ],
)
def test_what_there_is_passes(argument):
    check_options([argument], trainer_options("fit"))


def test_a_release_that_hides_its_settings_leaves_them_to_the_parser():
    found = function_options("tdm_lightning.cli.compare", "nothing")
    assert set(found) == {"config", "help", "print_config"}
    check_options(["--anything=3"], {})
    with pytest.raises(UsageError, match="no setting --anything"):
        check_options(["--anything=3"], {"config": ""})


@pytest.mark.parametrize("value", ["3", "-1", "1e-3", "1.5", "inf", "null", "true", "[1, 2]", "~"])
def test_what_may_be_a_number_passes(value):
    options = trainer_options("fit")
    for name in ("model.lr", "trainer.max_epochs", "data.streaming"):
        check_options([f"--{name}={value}"], options)
    with pytest.raises(UsageError, match="trainer.max_epochs must be a whole number or null"):
        check_options(["--trainer.max_epochs", "many"], options)
