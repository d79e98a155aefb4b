"""Names and kinds of settings, read off the sources: what is misspelt, or no number where one is
needed, is told before anything is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tdm_lightning.cli.configs import given_values, is_file, read_config
from tdm_lightning.cli.mistakes import UsageError, unknown_class, unknown_option, wrong_value

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


def trainer_options(command: str) -> dict[str, str]:
    """The settings of ``fit`` and its like, such as ``model.lr``, and their annotations; empty
    where the installed Lightning does not tell.
    """
    options = dict.fromkeys(("config", "seed_everything", "print_config", "help", *_GROUPS), "")
    for group, (package, file, class_name) in _GROUPS.items():
        own = _arguments(package, file, f"{class_name}.__init__")
        if not own:
            return {}
        options |= {f"{group}.{name}": kind for name, kind in own.items()}
    package, file, class_name = _GROUPS["trainer"]
    own = _arguments(package, file, f"{class_name}.{command}")
    return options | {name: kind for name, kind in own.items() if name not in _FILLED_IN}


def function_options(module: str, function: str) -> dict[str, str]:
    """The settings of a command that is a function of this library, and their annotations."""
    package, _, path = module.partition(".")
    own = _arguments(package, f"{path.replace('.', '/')}.py", function)
    return {"config": "", "help": "", "print_config": "", **own}


def underscored(arguments: Sequence[str]) -> list[str]:
    """Options' names as our functions spell them: ``--match-gmacs=3`` is ``--match_gmacs=3``."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = "--" + name[2:].replace("-", "_") + equals + value
        found.append(argument)
    return found


def check_options(arguments: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse an option, or a key of a configuration, that no setting begins with, and words for
    numbers.

    Args:
        arguments: of the command, configurations as files or as YAML itself.
        options: names of the settings and their annotations; empty: nothing is refused.

    Raises:
        UsageError: if there is one, or a configuration cannot be read.
    """
    names = set(options)
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
    for name, annotation in options.items():
        for value in given_values(arguments, name):
            _check_value(name, value, annotation)


def check_class(arguments: Sequence[str], option: str, kind: str, known: Iterable[str]) -> None:
    """Refuse a class that is not known by its short name.

    Args:
        arguments: of the command.
        option: that names it.
        kind: what it must be.
        known: the short names.

    Raises:
        UsageError: if there is one.
    """
    for value in given_values(arguments, option):
        if value.isidentifier() and value not in (*known, "null"):
            raise UsageError(unknown_class(option, kind, value, known))


def _check_value(name: str, value: str, annotation: str) -> None:
    """Whether a number, or true or false, is none; what else there is the parser checks."""
    kinds = re.findall(r"\w+", annotation)
    if not kinds or not set(kinds) <= {"Optional", "Union", "int", "float", "bool", "None"}:
        return
    try:
        float(value)
    except ValueError:
        if value.isidentifier() and isinstance(yaml.safe_load(value), str):
            kinds = [*kinds, "None"] if "Optional" in kinds else kinds
            raise UsageError(wrong_value(name, kinds, value)) from None


def _check(option: str, names: set[str], groups: set[str], prefix: str) -> None:
    """Whether something is a setting, the beginning of one, or lies inside one."""
    option = option.removesuffix("+")
    parts = option.split(".")
    around = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} - groups
    known = around & names or any(name.startswith(option) for name in names)
    if names and not known and parts[-1] != "help":
        raise UsageError(unknown_option(option, names - {"config"}, prefix))


@cache
def _arguments(package: str, file: str, function: str) -> dict[str, str]:
    """The arguments of a function or method in a source file, and their annotations; empty where it
    is not.
    """
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
                arguments = [*given.args, *given.kwonlyargs]
                return {
                    one.arg: ast.unparse(one.annotation) if one.annotation else ""
                    for one in arguments
                    if one.arg != "self"
                }
    return {}
