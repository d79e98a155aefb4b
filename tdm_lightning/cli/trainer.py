"""LightningCLI with this library's links and defaults."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import tdm_lightning.callbacks  # noqa: F401 - makes callbacks known by their short names
from tdm_lightning.checkpoints import open_weights, read_file
from tdm_lightning.cli.mistakes import translated, unwrapped
from tdm_lightning.cli.predictions import PredictionTable
from tdm_lightning.cli.stored import checkpoint_file, differences, fill_in
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import FileError, SettingError
from tdm_lightning.training import TokenReductionClassifier

#: Hyperparameters that follow from the data.
_LINKED_ARGUMENTS = ("num_classes", "label_names")

#: Those that say which model it is.
_MODEL = ("model.model", "model.model_kwargs", "model.global_pool", "model.strategy")


class TokenReductionCLI(LightningCLI):
    """Links data and model: the classes flow to the model, the model's name and arguments to the
    transforms. Who predicts may have no labels: then the classes are those of the training.

    A checkpoint's hyperparameters fill in what is not given; Lightning's own command line reads
    them over it (Lightning-AI/pytorch-lightning#20801).
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See ``LightningCLI``."""
        parser.link_arguments("model.model", "data.model", compute_fn=_name)
        parser.link_arguments("model.model_kwargs", "data.model_kwargs")
        for name, compute in (("num_classes", self._classes), ("label_names", self._names)):
            parser.link_arguments("data", f"model.{name}", compute, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """See ``LightningCLI``. The order is command line, configurations, environment, checkpoint,
        defaults.
        """
        command = args[0] if args else ""
        if command == "predict":  # they are written batch by batch
            self._subcommand_parsers[command].set_defaults({"return_predictions": False})
        own = self._subcommand_parsers.get(command, parser)

        def names() -> Iterable[str]:
            return own.get_defaults(skip_validation=True).keys()

        path = checkpoint_file(args, f"PL_{command.upper()}__CKPT_PATH")
        if command not in self.subcommands() or path is None:
            with translated(names):
                self.config = parser.parse_args(args)
            return
        stored = _hyperparameters(path)
        known = own.get_defaults(skip_validation=True)
        if unknown := sorted(name for name in stored if name not in known):
            raise SettingError(
                f"{path.name} was trained by another module class: it has"
                f" {', '.join(unknown)}; run it by that class's own command line"
            )

        def parse() -> Namespace:
            with translated(names):
                self.config = parser.parse_args(args)
            return self.config[command]

        settings = fill_in(own, parse, stored, "model.strategy")
        compared = {name: stored[name] for name in _MODEL if name in stored}
        if found := differences(settings, compared):
            text = "; ".join(found).replace("in the file", f"in {path.name}")
            print(f"tdm {command}: {text}", file=sys.stderr)

    def _classes(self, data: ImageNetDataModule) -> int | None:
        """Number of the model's classes: the data's; to predict, those that it was trained for,
        and without labels or weights those that timm's model has.
        """
        if self.subcommand != "predict" or data.hparams.num_classes is not None:
            return data.num_classes
        stored = self._trained_for.get("num_classes")
        return data.num_classes if stored is None and data.has_classes else stored

    def _names(self, data: ImageNetDataModule) -> list[str] | None:
        """What they are called."""
        if self.subcommand != "predict":
            return data.label_names
        stored = self._trained_for.get("label_names")
        return data.label_names if stored is None and data.has_classes else stored

    @cached_property
    def _trained_for(self) -> Mapping[str, Any]:
        """The classes that the checkpoint or the weights say."""
        settings = self.config[self.subcommand]
        weights = settings.get("ckpt_path") or settings["model"].get("weights")
        if not isinstance(weights, str) or not Path(weights).exists():
            return {}
        stored = open_weights(weights).stored
        return {} if stored is None else {**stored.model_kwargs, "label_names": stored.label_names}

    def _parse_ckpt_path(self) -> None:
        """Done by :meth:`parse_arguments`."""

    def instantiate_classes(self) -> None:
        """See ``LightningCLI``."""
        with unwrapped():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """See ``LightningCLI``."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:  # callbacks are there already: it is a setting
            raise SettingError(f"the Trainer refuses its settings: {error}") from error
        if self.subcommand == "predict":
            trainer.callbacks.append(PredictionTable())  # type: ignore[attr-defined]
        return trainer


def _hyperparameters(path: Path) -> dict[str, Any]:
    """A checkpoint's hyperparameters under the names of the options; nothing in it is run."""
    shards = path / "meta.pt"  # in a folder, by FSDP2
    file = shards if shards.is_file() else path
    if not file.is_file():
        raise FileError(f"there is no checkpoint {str(path)!r}, which --ckpt_path names")
    content = read_file(file)
    if "pytorch-lightning_version" not in content:
        raise FileError(
            f"{path} is no checkpoint of `tdm fit`; weights of another kind are taken by"
            f" --model.weights {path}"
        )
    stored = content.get("hyper_parameters")
    stored = stored if isinstance(stored, Mapping) else {}
    skipped = ("_instantiator", *_LINKED_ARGUMENTS)
    return {f"model.{name}": value for name, value in stored.items() if name not in skipped}


def _name(model: Any) -> str | None:
    """A timm model's name; modules given by class have none."""
    return model if isinstance(model, str) else None


def run(
    args: list[str], model_class: type | None = None, datamodule_class: type | None = None
) -> TokenReductionCLI:
    """Parse the arguments and run the chosen ``Trainer`` method.

    Raises:
        TokenReductionError: for what the user can mend; of Lightning's errors those about settings.
    """
    try:
        return _cli(args, model_class, datamodule_class)
    except MisconfigurationException as error:
        raise SettingError(str(error)) from error


def _cli(
    args: list[str], model_class: type | None, datamodule_class: type | None
) -> TokenReductionCLI:
    known = LightningCLI.subcommands()
    chosen = {name: known[name] for name in args[:1] if name in known} or known

    class ChosenCLI(TokenReductionCLI):
        """Makes the parser of one command and spares itself those of the others."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return chosen

    return ChosenCLI(
        model_class or TokenReductionClassifier,
        datamodule_class or ImageNetDataModule,
        args=args,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={},
        seed_everything_default=0,
        parser_kwargs={"default_env": True, "prog": "tdm", "exit_on_error": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
