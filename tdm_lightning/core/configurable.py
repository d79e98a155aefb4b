"""Objects that can be written down as plain values and built again from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from tdm_lightning.errors import SettingError, SettingTypeError, did_you_mean

T = TypeVar("T", bound="Configurable")


#: Classes of this library are stored under its own name, whichever module they live in.
_LIBRARY = "tdm_lightning"

#: The topmost room that defines some: importing it imports the others. By name, as this is below.
_HIGHEST = f"{_LIBRARY}.sparsity"


def stored_name(cls: type) -> str:
    """The name under which a class is written to files: stable for this library's classes.

    ``tdm_lightning.TDM`` and its like for what this library defines, the import path for a user's.
    """
    if _is_own(cls):
        return f"{_LIBRARY}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


class Configurable:
    """Stores every ``__init__`` argument under its own name; that is all :meth:`config` needs.

    The plain form is the one the command line uses, ``{"class_path": …, "init_args": {…}}``.
    Building looks the class up among the subclasses that are already imported, so reading a file
    never imports or runs anything that it names.
    """

    _registry: ClassVar[dict[str, type[Configurable]]] = {}

    #: Arguments that releases before this one had, and the value that files hold where nobody set
    #: them: they are read over. No other value can be followed any more.
    retired: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configurable._registry[f"{cls.__module__}.{cls.__qualname__}"] = cls

    def config(self) -> dict[str, Any]:
        """The arguments this object was made with, as plain values."""
        names = _arguments(type(self))
        return {
            "class_path": stored_name(type(self)),
            "init_args": {name: _plain(getattr(self, name)) for name in names},
        }

    def __repr__(self) -> str:
        return _readable(self.config())

    @classmethod
    def known(cls) -> dict[str, type[Configurable]]:
        """This library's subclasses and those imported from elsewhere, by their import paths."""
        import_module(_HIGHEST)
        registry = Configurable._registry.items()
        return {path: known for path, known in registry if issubclass(known, cls)}

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
        """Build an object from :meth:`config`'s form; a class may also be named without its module.

        Raises:
            ValueError: if the class is not an imported subclass of this one, or several bear its
                short name.
            TypeError: if an argument is unknown or missing, or the form is another.
        """
        path, given = _parts(config)
        found = cls._find(path)
        given = without_retired(found, given)
        arguments = {name: _built(value) for name, value in given.items()}
        try:
            inspect.signature(found).bind(**arguments)
        except TypeError as error:
            raise SettingTypeError(f"{found.__name__} cannot be made so: {error}") from None
        return found(**arguments)  # type: ignore[return-value]

    @classmethod
    def _find(cls, path: str) -> type[Configurable]:
        known = cls.known()
        if path in known:
            return known[path]
        if path.startswith(f"{_LIBRARY}."):
            # Modules of this library move; a path into it, also one that 0.1.0 wrote, means a name.
            path = f"{_LIBRARY}.{path.rpartition('.')[2]}"
        names_of = {where: (stored_name(one), one.__name__) for where, one in known.items()}
        found = {where: known[where] for where, names in names_of.items() if path in names}
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise SettingError(
                f"{path!r} is the name of {len(found)} classes; say which by its import path:"
                f" {', '.join(sorted(found))}"
            )
        names = sorted(one.__name__ for one in known.values())
        hint = did_you_mean(path.rpartition(".")[2], names) or f"; known are {', '.join(names)}."
        raise SettingError(
            f"{path!r} is not a known {cls.__name__}{hint} If it is your own class, import its"
            " module before loading."
        )


def _parts(config: Any) -> tuple[str, Mapping[str, Any]]:
    """A stored object's class and arguments."""
    path = config.get("class_path") if isinstance(config, Mapping) else None
    given = {} if path is None else config.get("init_args")
    given = {} if given is None else given
    if not isinstance(path, str) or not isinstance(given, Mapping):
        raise SettingTypeError(
            "a stored object is written {'class_path': NAME, 'init_args': {…}}, and this is"
            f" {config!r}"
        )
    return path, given


def without_retired(cls: type[Configurable], init_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a stored object without those that its class no longer has.

    Raises:
        ValueError: if one of these was set to something that the class cannot do any more.
    """
    for name, value in init_args.items():
        if name in cls.retired and value != cls.retired[name]:
            raise SettingError(
                f"{cls.__name__} no longer has {name}={value!r}: no measurement ever chose it."
                " Files that use it need tdm-lightning 0.1.0"
            )
    return {name: value for name, value in init_args.items() if name not in cls.retired}


def modern(value: Any) -> Any:
    """Plain values that an earlier release may have written, as this one writes them.

    Classes of this library go by their public names, and arguments that they no longer have are
    left out.

    Raises:
        ValueError: see :func:`without_retired`.
    """
    if isinstance(value, (list, tuple)):
        return [modern(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: modern(item) for key, item in value.items()}
    path = found.get("class_path")
    if not isinstance(path, str) or not path.startswith(f"{_LIBRARY}."):
        return found
    known = {one.__name__: one for one in Configurable.known().values() if _is_own(one)}
    name = path.rpartition(".")[2]
    if name in known:
        arguments = without_retired(known[name], _parts(found)[1])
        found = {**found, "class_path": f"{_LIBRARY}.{name}", "init_args": arguments}
    return found


def is_known(value: Any) -> bool:
    """Whether all classes that plain values name have been imported."""
    if isinstance(value, (list, tuple)):
        return all(map(is_known, value))
    if not isinstance(value, Mapping):
        return True
    path = value.get("class_path")
    names = {
        name for where, one in Configurable.known().items() for name in (where, stored_name(one))
    }
    known = path is None or (isinstance(path, str) and path in names)
    return known and all(map(is_known, value.values()))


def _arguments(cls: type) -> list[str]:
    """Names of a class's ``__init__`` arguments, with those that it hands on to the next class."""
    names: list[str] = []
    for kind in cls.__mro__:
        if kind is object or "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        own = [name for name, one in parameters.items() if one.kind in named and name != "self"]
        names += [name for name in own if name not in names]
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == _LIBRARY


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
