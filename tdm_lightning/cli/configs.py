"""The configurations that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path

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
            argument = _resolve(argument)
        elif argument.startswith("--config="):
            argument = f"--config={_resolve(argument.removeprefix('--config='))}"
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
