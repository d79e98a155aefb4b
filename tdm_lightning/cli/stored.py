"""Settings that a file brings along: they fill in what the user did not give."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from tdm_lightning.cli.configs import given_values, read_config
from tdm_lightning.core.configurable import is_known, modern
from tdm_lightning.errors import FileError

#: Names that ``Trainer.fit`` and its like take for a checkpoint that is not a file yet.
_KEYWORDS = ("best", "last", "hpc", "registry")


def option_value(arguments: Sequence[str], name: str, variable: str) -> str | None:
    """The value that the user gives an option: on the command line, in a config file, or in the
    environment, the first of these that says something.

    Args:
        arguments: of the command, its configurations resolved.
        name: of the option, without dashes.
        variable: of the environment.
    """
    found = os.environ.get(variable)
    for config in given_values(arguments, "config"):
        found = read_config(config).get(name, found)
    for value in given_values(arguments, name):
        found = value
    return None if found in (None, "null", "") else str(found)


def checkpoint_file(arguments: Sequence[str], variable: str) -> Path | None:
    """The checkpoint that a run starts from, where that is a file."""
    path = option_value(arguments, "ckpt_path", variable)
    if path is None or path in _KEYWORDS or "://" in path:
        return None
    return Path(path)


def fill_in(
    parser: ArgumentParser,
    parse: Callable[[], Namespace],
    stored: Mapping[str, Any],
    strategy: str,
) -> Namespace:
    """Parse; what the arguments do not say comes from a file, and then from the defaults.

    Args:
        parser: whose defaults are changed.
        parse: gives the settings of that parser.
        stored: settings by their full names, such as ``model.lr``.
        strategy: the name of the strategy among them. Its arguments only fill in where the user
            gives no other class: those of one method mean nothing to another.
    """
    stored = {name: modern(value) for name, value in stored.items()}
    if not is_known(stored.get(strategy)):
        # Nothing that a file names is imported, but the user may name the class too.
        parsed = parse()
        if not is_known(stored[strategy]):
            if parsed.get(strategy) is None:
                raise FileError(
                    f"the stored strategy is {_classes(stored[strategy])}, which is not known here;"
                    f" give --{strategy} with that class, or install its module as a plugin"
                )
            stored.pop(strategy)
    parser.set_defaults(dict(stored))
    settings = parse()
    if _classes(settings.get(strategy)) == _classes(stored.get(strategy)):
        return settings
    parser.set_defaults({strategy: None})
    return parse()


def differences(settings: Namespace, stored: Mapping[str, Any]) -> list[str]:
    """What was given that a file says otherwise, ``NAME is GIVEN as given, STORED in the file``."""
    found = []
    for name, value in stored.items():
        parsed = dict(_leaves(name, _plain(settings.get(name))))
        there = dict(_leaves(name, modern(value)))
        found += [
            f"{key} is {_shown(parsed.get(key))} as given, {_shown(there.get(key))} in the file"
            for key in sorted(parsed.keys() | there.keys())
            if parsed.get(key) != there.get(key)
        ]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _classes(value: Any) -> Any:
    """The class of a strategy, or those of a list of them."""
    value = _plain(value)
    if isinstance(value, list):
        return [_classes(item) for item in value]
    return value.get("class_path") if isinstance(value, Mapping) else value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Settings one by one, an object's arguments under its own name."""
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, value["class_path"]
        value = value.get("init_args") or {}
    elif not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from _leaves(f"{name}.{key}", item)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
