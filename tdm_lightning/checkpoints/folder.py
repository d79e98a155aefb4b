"""Folders and hub repositories that hold a reduced model, as ``save_pretrained`` writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tdm_lightning.errors import FileError
from tdm_lightning.version import __version__

#: Version of what stands under :data:`KEY` in ``config.json``.
FORMAT = 1

#: Where our part of ``config.json`` stands; all other entries are timm's.
KEY = "tdm_lightning"

#: What values of ``config.json`` must be.
_WORDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    Mapping: "entries by name",
}

#: Names of the files.
CONFIG, WEIGHTS, STRATEGY = "config.json", "model.safetensors", "strategy.safetensors"


def local_folder(name: str, **download: Any) -> Path:
    """A folder as it is, or the local copy of a hub repository, ``USER/NAME``.

    Args:
        name: folder or repository.
        download: passed to ``huggingface_hub.snapshot_download``, such as ``revision``.

    Raises:
        ValueError: if there is neither such a folder nor such a repository within reach.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        found = snapshot_download(
            name,
            allow_patterns=[CONFIG, WEIGHTS, STRATEGY],
            library_name="tdm-lightning",
            library_version=__version__,
            **download,
        )
    except (OSError, HFValidationError) as error:
        raise FileError(
            f"{name!r} is neither a folder nor a repository of the hub that can be reached:"
            f" {error}\nCheck the name and the connection; for a private repository, log in with"
            " `hf auth login`"
        ) from error
    return Path(found)


def read_config(folder: Path, origin: str) -> dict[str, Any]:
    """The content of ``config.json``, complete.

    Args:
        folder: where it lies.
        origin: what to call that in errors.

    Raises:
        ValueError: if it is missing, no JSON, incomplete, or of a newer format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{origin} has no config.json; save_pretrained() writes one") from error
    except ValueError as error:
        raise FileError(f"config.json of {origin} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileError(
            f"config.json of {origin} holds a {type(config).__name__}, expected entries by name"
        )
    check_config(config, origin)
    return config


def check_config(config: Mapping[str, Any], origin: str) -> None:
    """Whether a config describes a reduced model that this release can build.

    Raises:
        ValueError: if it is incomplete, an entry is of another kind, or it is of a newer format.
    """
    own = config.get(KEY)
    if not isinstance(own, Mapping):
        raise FileError(
            f"{origin} holds no reduced model: its config.json has no {KEY!r}. For a plain model of"
            " timm's use timm.create_model('hf-hub:…', pretrained=True) and attach()"
        )
    _check_kinds(own, f"{KEY}.", {"format": int, "dtype": str, "strategy": Mapping}, origin)
    if own.get("format", 0) > FORMAT:
        raise FileError(
            f"{origin} was written by tdm-lightning {own.get('version', '(unknown)')} in format"
            f" {own['format']}, and this release, {__version__}, reads up to format {FORMAT}: pip"
            " install --upgrade tdm-lightning"
        )
    needed = ("architecture", "num_classes", "pretrained_cfg")
    missing = [key for key in needed if key not in config]
    missing += [f"{KEY}.{key}" for key in ("format", "dtype", "strategy") if key not in own]
    if missing:
        raise FileError(
            f"config.json of {origin} is incomplete: it has no {', '.join(map(repr, missing))}"
        )
    kinds = {"architecture": str, "num_classes": int, "pretrained_cfg": Mapping}
    _check_kinds(config, "", {**kinds, "model_args": Mapping, "label_names": list}, origin)


def _check_kinds(
    entries: Mapping[str, Any], prefix: str, kinds: Mapping[str, type], origin: str
) -> None:
    for key, kind in kinds.items():
        value = entries.get(key)
        if key in entries and (not isinstance(value, kind) or isinstance(value, bool)):
            raise FileError(
                f"{prefix}{key} in config.json of {origin} must be {_WORDS[kind]}, and is {value!r}"
            )


def read_weights(folder: Path, name: str, origin: str) -> dict[str, Tensor]:
    """The weights of one of the folder's files.

    Raises:
        ValueError: if it is missing or incomplete.
    """
    try:
        return load_file(folder / name)
    except (FileNotFoundError, SafetensorError) as error:
        raise FileError(f"{name} of {origin} is missing or incomplete: {error}") from error


def read_folder(folder: Path, origin: str) -> dict[str, Tensor]:
    """All weights of a folder under this library's names: timm's, a strategy's by ``strategy.…``.

    Raises:
        ValueError: if a file is missing or incomplete.
    """
    weights = {f"vit.{k}": w for k, w in read_weights(folder, WEIGHTS, origin).items()}
    if (folder / STRATEGY).exists():
        own = read_weights(folder, STRATEGY, origin)
        weights |= {f"strategy.{name}": weight for name, weight in own.items()}
    return weights
