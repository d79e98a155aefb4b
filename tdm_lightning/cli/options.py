"""Names of settings, read off the sources: a misspelt one is told before anything is imported."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tdm_lightning.cli.configs import given_values, is_file, read_config
from tdm_lightning.cli.mistakes import UsageError, unknown_option

#: Where the groups of settings come from: (package, file in it, class).
_GROUPS = {
    "model": ("tdm_lightning", "training/module.py", "TokenReductionClassifier"),
    "data": ("tdm_lightning", "data/module.py", "ImageNetDataModule"),
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
}

#: What the trainer's methods are given by the command line itself.
_FILLED_IN = {"self", "model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}

#: Names of 0.1.0, which configurations may hold.
_OLD = {"model.pretrained", "model.checkpoint"}


def trainer_options(command: str) -> set[str]:
    """The settings of ``fit`` and its like, such as ``model.lr``; empty where the installed
    Lightning does not tell.
    """
    names = {"config", "seed_everything", "print_config", "help", *_GROUPS}
    for group, (package, file, class_name) in _GROUPS.items():
        own = _arguments(package, file, f"{class_name}.__init__")
        if not own:
            return set()
        names |= {f"{group}.{name}" for name in own}
    package, file, class_name = _GROUPS["trainer"]
    return names | _arguments(package, file, f"{class_name}.{command}") - _FILLED_IN


def function_options(module: str, function: str) -> set[str]:
    """The settings of a command that is a function of this library."""
    package, _, path = module.partition(".")
    return {"config", "help"} | _arguments(package, f"{path.replace('.', '/')}.py", function)


def underscored(arguments: Sequence[str]) -> list[str]:
    """Options' names as our functions spell them: ``--match-gmacs=3`` is ``--match_gmacs=3``."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = "--" + name[2:].replace("-", "_") + equals + value
        found.append(argument)
    return found


def check_options(arguments: Sequence[str], names: set[str]) -> None:
    """Refuse an option, or a key of a configuration, that no setting begins with.

    Args:
        arguments: of the command, configurations as files or as YAML itself.
        names: of the settings; empty: nothing is refused.

    Raises:
        UsageError: if there is one, or a configuration cannot be read.
    """
    groups = {name.partition(".")[0] for name in names if "." in name}
    for config in given_values(arguments, "config"):
        where = Path(config).name if is_file(config) else "--config"
        for key, value in read_config(config).items():
            if key in groups and isinstance(value, list):
                raise UsageError(
                    f"{where}: {key} must hold settings by name, lines of NAME: VALUE, got a list"
                )
            inner = value if key in groups and isinstance(value, Mapping) else None
            for name in [key] if inner is None else [f"{key}.{name}" for name in inner]:
                _check(str(name), names | _OLD, groups, f"{where}: ")
    for argument in arguments:
        if argument.startswith("--"):
            _check(argument[2:].partition("=")[0], names, groups, "--")


def _check(option: str, names: set[str], groups: set[str], prefix: str) -> None:
    """Whether something is a setting, the beginning of one, or lies inside one."""
    option = option.removesuffix("+")
    parts = option.split(".")
    around = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} - groups
    known = around & names or any(name.startswith(option) for name in names)
    if names and not known and parts[-1] != "help":
        raise UsageError(unknown_option(option, names - {"config"}, prefix))


@cache
def _arguments(package: str, file: str, function: str) -> frozenset[str]:
    """Names of the arguments of a function or method in a source file; empty where it is not."""
    found = find_spec(package)  # of a package on top, which is not imported for that
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / file
        if path.is_file():
            body: list[Any] = ast.parse(path.read_text(encoding="utf-8")).body
            for name in function.split("."):
                body = [one for one in body if getattr(one, "name", None) == name]
                if "." in function and name != function.rpartition(".")[2]:
                    body = body[0].body if body else []
            if body:
                given = body[0].args
                return frozenset(one.arg for one in (*given.args, *given.kwonlyargs)) - {"self"}
    return frozenset()
