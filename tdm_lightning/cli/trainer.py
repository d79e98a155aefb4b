"""LightningCLI with this library's links and defaults."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import tdm_lightning.callbacks  # noqa: F401 - makes callbacks known by their short names
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.training.module import TokenReductionClassifier


class TokenReductionCLI(LightningCLI):
    """Links data and model: the classes flow to the model, the model's name and arguments to the
    transforms.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See ``LightningCLI``."""
        parser.link_arguments("model.model", "data.model", compute_fn=_name)
        parser.link_arguments("model.model_kwargs", "data.model_kwargs")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.label_names", "model.label_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """See ``LightningCLI``, which warns about arguments given from Python: here they always
        are.
        """
        self.config = parser.parse_args(args)

    def after_predict(self) -> None:
        """Write the predictions as a table."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        batches = self.trainer.predict_loop.predictions or []
        path = folder / "predictions.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "name", "probability"])
            index = 0
            for batch in batches:
                best = batch["probabilities"].max(dim=-1).values.tolist()
                for label, name, probability in zip(
                    batch["label"].tolist(), batch["name"], best, strict=True
                ):
                    writer.writerow([index, label, name, f"{probability:.6f}"])
                    index += 1
        print(f"wrote {index} predictions to {path}")


def _name(model: Any) -> str | None:
    """A timm model's name; modules given by class have none."""
    return model if isinstance(model, str) else None


def run(
    args: list[str], model_class: type | None = None, datamodule_class: type | None = None
) -> TokenReductionCLI:
    """Parse the arguments and run the chosen ``Trainer`` method."""
    return TokenReductionCLI(
        model_class or TokenReductionClassifier,
        datamodule_class or ImageNetDataModule,
        args=args,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={},
        seed_everything_default=0,
        parser_kwargs={"default_env": True, "prog": "tdm"},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
