"""The configurations that ship with the package, by name."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tdm_lightning.core.configurable import modern
from tdm_lightning.errors import SettingError


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
    resolved = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before in ("--config", "-c"):
            argument = current(_resolve(argument))
        elif argument.startswith("--config="):
            argument = f"--config={current(_resolve(argument.removeprefix('--config=')))}"
        resolved.append(argument)
    return resolved


def _resolve(value: str) -> str:
    if Path(value).is_file() or "\n" in value or value.startswith("{"):  # a file, or YAML itself
        return value
    shipped = config_folder() / f"{value.removesuffix('.yaml').removeprefix('configs/')}.yaml"
    if not shipped.is_file():
        raise SettingError(
            f"--config {value}: neither a file nor one of the shipped configurations:"
            f" {', '.join(named_configs())}"
        )
    return str(shipped)


def current(config: str) -> str:
    """A configuration as it is, or, where 0.1.0 wrote it, its content as this release has it.

    Classes go by their public names, arguments that no longer exist are left out, and
    ``model.pretrained`` and ``model.checkpoint`` are ``model.weights``.

    Args:
        config: a file, or YAML itself.
    """
    path = Path(config)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else config)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return config  # the parser says what is wrong with it
    if not isinstance(content, dict):
        return config
    changed = modern(content)
    model = changed.get("model")
    if isinstance(model, dict) and model.keys() & {"pretrained", "checkpoint"}:
        pretrained, checkpoint = model.pop("pretrained", None), model.pop("checkpoint", None)
        model.setdefault("weights", checkpoint or (True if pretrained else None))
    return config if changed == content else json.dumps(changed)
