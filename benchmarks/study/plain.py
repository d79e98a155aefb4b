"""The trained, unreduced model that all methods start from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from tdm_lightning.checkpoints.files import read_file
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies import Strategy
from tdm_lightning.training.module import TokenReductionClassifier


@dataclass(frozen=True)
class Plain:
    """A checkpoint of ``tdm fit`` without a strategy.

    Attributes:
        checkpoint: the file.
        model: name of the timm model.
        model_kwargs: what it is made with, the number of classes included.
        fingerprint: the first 12 digits of the file's SHA-256.
    """

    checkpoint: str
    model: str
    model_kwargs: dict[str, Any]
    fingerprint: str

    @classmethod
    def read(cls, path: str) -> Plain:
        """What a file holds.

        Raises:
            ValueError: if it is no checkpoint of ``tdm fit``, or one of a reduced model.
            FileNotFoundError: if there is none.
        """
        settings = read_file(path).get(TokenReductionClassifier.CHECKPOINT_HYPER_PARAMS_KEY)
        if not settings or not isinstance(settings.get("model"), str):
            raise SettingError(
                f"{path} does not say which model it holds: give a checkpoint that `tdm fit` wrote"
            )
        if settings.get("strategy") is not None:
            raise SettingError(
                f"{path} was trained under {settings['strategy']['class_path'].rsplit('.', 1)[-1]};"
                " the study starts from a plain model: train with strategy=null"
            )
        arguments = {name: settings.get(name) for name in ("num_classes", "global_pool")}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        return cls(
            path, settings["model"], {**arguments, **(settings.get("model_kwargs") or {})}, digest
        )

    def kwargs_for(self, strategy: Strategy) -> dict[str, Any]:
        """How to make the timm model for a strategy; one that needs another pooling gets it, after
        the norm as trained.
        """
        if strategy.requires().pooling is None:
            return self.model_kwargs
        return {**self.model_kwargs, "global_pool": "avg", "fc_norm": False}

    def vit(self, strategy: Strategy) -> nn.Module:
        """The timm model for a strategy, with random weights: to count what it costs."""
        return timm.create_model(self.model, **self.kwargs_for(strategy))

    def under(self, strategy: Strategy, **recipe: Any) -> TokenReductionClassifier:
        """The trained model under a strategy.

        Args:
            strategy: not attached yet.
            recipe: other arguments of :class:`~tdm_lightning.TokenReductionClassifier`.
        """
        return TokenReductionClassifier(
            self.model,
            strategy,
            model_kwargs=self.kwargs_for(strategy),
            weights=self.checkpoint,
            **recipe,
        )
