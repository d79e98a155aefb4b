"""Objects that can be written down as plain values and built again from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

T = TypeVar("T", bound="Configurable")


class Configurable:
    """Stores every ``__init__`` argument under its own name; that is all :meth:`config` needs.

    The plain form is the one the command line uses, ``{"class_path": …, "init_args": {…}}``.
    Building looks the class up among the subclasses that are already imported, so reading a file
    never imports or runs anything that it names.
    """

    _registry: ClassVar[dict[str, type[Configurable]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configurable._registry[f"{cls.__module__}.{cls.__qualname__}"] = cls

    def config(self) -> dict[str, Any]:
        """The arguments this object was made with, as plain values."""
        names = [
            name for name in inspect.signature(type(self).__init__).parameters if name != "self"
        ]
        cls = type(self)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {name: _plain(getattr(self, name)) for name in names},
        }

    def __repr__(self) -> str:
        return _readable(self.config())

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
        """Build an object from :meth:`config`'s form; a class may also be named without its module.

        Raises:
            ValueError: if the class is not an imported subclass of this one.
            TypeError: if an argument is unknown.
        """
        path = config["class_path"]
        found = [
            known
            for name, known in Configurable._registry.items()
            if issubclass(known, cls)
            and path in (name, known.__name__, f"tdm_lightning.{known.__name__}")
        ]
        if not found:
            names = sorted(
                known.__name__
                for known in Configurable._registry.values()
                if issubclass(known, cls)
            )
            raise ValueError(
                f"{path!r} is not a known {cls.__name__}; known are {', '.join(names)}. "
                "If it is your own class, import its module before loading."
            )
        arguments = {name: _built(value) for name, value in (config.get("init_args") or {}).items()}
        return found[-1](**arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, Configurable):
        return value.config()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(item) for item in value]
    return (
        Configurable.from_config(value)
        if isinstance(value, Mapping) and "class_path" in value
        else value
    )


def arguments_line(config: Mapping[str, Any]) -> str:
    """The arguments of :meth:`Configurable.config`'s form as in a call: ``keep_rate=0.7, layers=[3,
    6, 9]``.
    """
    return ", ".join(f"{name}={_readable(value)}" for name, value in config["init_args"].items())


def _readable(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return f"{value['class_path'].rsplit('.', 1)[-1]}({arguments_line(value)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_readable, value))}]"
    return repr(value)
