"""Weights, wherever they lie: a file, a folder, a repository of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from tdm_lightning.checkpoints.files import read_file
from tdm_lightning.checkpoints.folder import KEY, local_folder, read_config, read_folder
from tdm_lightning.checkpoints.load import LoadReport, load_official
from tdm_lightning.errors import FileError


@dataclass(frozen=True)
class Stored:
    """What a checkpoint of ``tdm fit``, or a folder of ``save_pretrained``, says of its model.

    Attributes:
        model: timm's name; ``None`` where the model was given as a module.
        model_kwargs: arguments of ``timm.create_model``.
        strategy: the strategy in its plain form; ``None``: the plain model.
        label_names: what the classes are called, if that is known.
    """

    model: str | None
    model_kwargs: dict[str, Any]
    strategy: Any
    label_names: list[str] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What ``save_pretrained`` wants to know beyond the model itself."""
        labels = {"label_names": self.label_names} if self.label_names else {}
        return {"model_args": self.model_kwargs, **labels}


@dataclass(frozen=True)
class Source:
    """Weights that have been found.

    Attributes:
        name: what the user called them.
        content: what the file or folder holds.
        stored: what it says of its model; ``None``: nothing.
    """

    name: str
    content: Mapping[str, Any] = field(repr=False)
    stored: Stored | None

    def without_strategy(self) -> Source:
        """The weights of the ViT alone, for another strategy."""
        content = dict(self.content)
        weights = content.get("state_dict", content)
        kept = {name: weight for name, weight in weights.items() if "strategy." not in name}
        inside = kept if weights is content else {**content, "state_dict": kept}
        return replace(self, content=inside)


def open_weights(weights: str | os.PathLike[str]) -> Source:
    """Find weights and what is stored with them; nothing in a file is run.

    Args:
        weights: a file (an official checkpoint, ``.safetensors``, a checkpoint of ``tdm fit``), a
            folder that ``save_pretrained`` wrote, or a repository of the hub, ``USER/NAME``.

    Raises:
        ValueError: if there is no such thing, or it cannot be read.
    """
    name = os.fspath(weights)
    if os.path.isfile(name):
        content = read_file(name)
        return Source(name, content, _of_run(content, name))
    repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).suffix
    if not os.path.isdir(name) and not repository:
        raise FileError(
            f"there are no weights at {name!r}: expected a file, a folder that save_pretrained()"
            " wrote, or a repository of the hub, USER/NAME"
        )
    folder = local_folder(name)
    config = read_config(folder, name)
    arguments = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
    stored = Stored(
        config["architecture"], arguments, config[KEY]["strategy"], config.get("label_names")
    )
    return Source(name, read_folder(folder, name), stored)


def load_weights(
    model: nn.Module, weights: str | os.PathLike[str] | Source, skip_head: bool = False
) -> LoadReport:
    """Load weights into a ViT, plain or reduced: all of them or none.

    Args:
        model: changed in place.
        weights: as in :func:`open_weights`, or what it found.
        skip_head: leave the model's classifier as it is.

    Raises:
        ValueError: if there are none, or they do not fit; every name is in the message.
    """
    source = weights if isinstance(weights, Source) else open_weights(weights)
    try:
        return load_official(model, source.content, skip_head=skip_head)
    except FileError as error:
        raise FileError(str(error).replace("the state dict", source.name)) from error


def _of_run(content: Mapping[str, Any], origin: str) -> Stored | None:
    """What a checkpoint of ``tdm fit`` says; other files say nothing.

    Raises:
        ValueError: if what it says of the model is of another kind than ``tdm fit`` writes.
    """
    given = content.get("hyper_parameters")
    if "pytorch-lightning_version" not in content or not isinstance(given, Mapping):
        return None
    if "strategy" not in given:
        return None
    kinds: dict[str, tuple[type, ...]] = {
        "model": (str,),
        "model_kwargs": (Mapping,),
        "strategy": (Mapping, list),
        "label_names": (list,),
    }
    for key, kind in kinds.items():
        value = given.get(key)
        if value is not None and not isinstance(value, kind):
            raise FileError(
                f"hyper_parameters.{key} of {origin} is a {type(value).__name__}, which tdm fit"
                " never writes: the file is damaged, or another program's"
            )
    arguments = {name: given.get(name) for name in ("num_classes", "global_pool")}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return Stored(
        given.get("model"),
        {**arguments, **(given.get("model_kwargs") or {})},
        given["strategy"],
        given.get("label_names"),
    )
