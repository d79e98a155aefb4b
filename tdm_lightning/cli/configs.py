"""The configurations that ship with the package, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tdm_lightning.errors import SettingError, did_you_mean


def config_folder() -> Path:
    """Where the shipped configurations lie, in a checkout or an installed wheel."""
    from importlib.resources import files

    return Path(str(files("tdm_lightning.configs")))


def named_configs() -> list[str]:
    """Names that ``--config`` understands, such as ``quickstart`` or ``strategies/tdm``."""
    folder = config_folder()
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )


def with_named_configs(arguments: list[str]) -> list[str]:
    """Replace names of shipped configurations behind ``--config`` by their paths; files come first.

    Raises:
        ValueError: if something is neither a file nor a name.
    """
    return _mapped(arguments, _resolve)


def given_values(arguments: Sequence[str], name: str) -> Iterator[str]:
    """What is given for an option, in order; ``--config`` is ``-c`` too."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == f"--{name}" or (name == "config" and before == "-c"):
            yield argument
        elif argument.startswith(f"--{name}="):
            yield argument.partition("=")[2]


class _Strict(yaml.SafeLoader):
    """Takes no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise SettingError(
                    f"{key.value!r} stands there twice, again in line"
                    f" {key.start_mark.line + 1}; leave one out"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(config: str) -> Mapping[str, Any]:
    """The content of a configuration.

    Args:
        config: a file, or YAML itself.

    Raises:
        ValueError: if it cannot be read, is no YAML, no settings by name, or has a key twice.
    """
    path, where = Path(config), "--config"
    try:
        if is_file(config):
            where, config = path.name, path.read_text(encoding="utf-8")
        content = yaml.load(config, _Strict)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{where} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingError(f"{where}{line}: this is no YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{where} is no YAML: {error}") from error
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise SettingError(
            f"{where} must hold settings by name, lines of NAME: VALUE, got a"
            f" {type(content).__name__}"
        )
    return content


def is_file(config: str) -> bool:
    """Whether this is a file, and not YAML itself, which may be too long for a name."""
    try:
        return Path(config).is_file()
    except OSError:
        return False


def _resolve(value: str) -> str:
    if is_file(value) or "\n" in value or value.startswith("{"):  # a file, or YAML itself
        return value
    shipped = config_folder() / f"{value.removesuffix('.yaml').removeprefix('configs/')}.yaml"
    if not shipped.is_file():
        known = named_configs()
        raise SettingError(
            f"--config {value}: neither a file nor one of the shipped configurations"
            f"{did_you_mean(value, known) or ': ' + ', '.join(known)}"
        )
    return str(shipped)


def with_current_configs(arguments: list[str]) -> list[str]:
    """Replace configurations that 0.1.0 wrote by their content as this release has it.

    Classes go by their public names, arguments that no longer exist are left out, and
    ``model.pretrained`` and ``model.checkpoint`` are ``model.weights``.
    """
    return _mapped(arguments, _current)


def _mapped(arguments: Sequence[str], change: Callable[[str], str]) -> list[str]:
    """The arguments with every configuration changed."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before in ("--config", "-c"):
            argument = change(argument)
        elif argument.startswith("--config="):
            argument = f"--config={change(argument.removeprefix('--config='))}"
        found.append(argument)
    return found


def _current(config: str) -> str:
    # Not above: names of configurations are told without it.
    from tdm_lightning.core.configurable import modern

    content = read_config(config)
    changed = modern(content)
    model = changed.get("model")
    if isinstance(model, dict) and model.keys() & {"pretrained", "checkpoint"}:
        pretrained, checkpoint = model.pop("pretrained", None), model.pop("checkpoint", None)
        model.setdefault("weights", checkpoint or (True if pretrained else None))
    return config if changed == content else json.dumps(changed)
