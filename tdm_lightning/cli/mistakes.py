"""Errors of the parser, and of the library where others have wrapped them, in one line."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from textwrap import dedent

import yaml

from tdm_lightning.errors import SettingError, TokenReductionError, did_you_mean


class UsageError(SettingError):
    """Arguments that cannot be parsed."""


#: What the parser calls the types that settings have, and what a user does.
_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "None": "null",
    "Sequence": "a list",
    "Iterable": "a list",
    "list": "a list",
    "tuple": "a list",
    "dict": "settings by name",
}

#: How the parser begins where the alternatives of a type have all failed.
_NONE_FITS = "Does not validate against any of the Union subtypes"


@contextmanager
def translated(names: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Raise the parser's errors in one line, with what was expected and names spelt nearly so.

    Args:
        names: gives the names of all settings.
    """
    try:
        yield
    except ArgumentError as error:
        own = _inner(error)
        raise UsageError(explain(error.message, names()) if own is None else str(own)) from error


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what a class itself raised while it was built, where jsonargparse, which builds it,
    wrapped that; whatever else is raised inside stays as it is.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        own: BaseException | None = _inner(error)
        if own is None and str(error).startswith(_NONE_FITS):
            own = error.__cause__
        if own is None or own is error:
            raise
        raise own from None


def _inner(error: BaseException | None) -> TokenReductionError | None:
    while error is not None and not isinstance(error, TokenReductionError):
        error = error.__cause__ or error.__context__
    return error


def unknown_option(option: str, names: Iterable[str], prefix: str = "--") -> str:
    """What to say of a setting that there is not.

    >>> unknown_option("model.lrr", ["model.lr", "trainer.devices"])
    'there is no setting --model.lrr; did you mean --model.lr?'
    """
    names = list(names)
    group = option.rpartition(".")[0]
    beside = [name for name in names if name.rpartition(".")[0] == group] or names
    hint = did_you_mean(option, beside, most=1) or did_you_mean(option, names, most=1)
    shown = prefix if prefix == "--" else ""
    hint = hint.replace("mean ", f"mean {shown}")
    rest = "; `--help` behind the command lists all" if not hint else ""
    return f"{'' if shown else prefix}there is no setting {shown}{option}{hint}{rest}"


def unknown_class(key: str, kind: str, name: str, known: Iterable[str]) -> str:
    """What to say of a class that there is not.

    >>> unknown_class("model.strategy", "Strategy", "EVit", ["EViT", "TDM"])
    "model.strategy: there is no Strategy 'EVit'; did you mean EViT?"
    """
    known = sorted(known)
    hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
    return f"{key}: there is no {kind} {name!r}{hint}"


def wrong_value(key: str, kinds: Iterable[str], value: str) -> str:
    """What to say of a value of another kind.

    >>> wrong_value("trainer.max_epochs", ["Optional", "int", "None"], "many")
    'trainer.max_epochs must be a whole number or null, got many'
    """
    words = list(dict.fromkeys(word for kind in kinds for word in _kind(kind)))
    expected = " or ".join(words) if len(words) < 4 else f"one of {', '.join(words)}"
    return f"{key} must be {expected}, got {value}"


def explain(message: str, names: Iterable[str] = ()) -> str:
    """A message of jsonargparse in one line.

    Args:
        message: as it is.
        names: of all settings.

    >>> explain('''Parser key "model.lr":
    ...   Expected a <class 'float'>. Got value: fast''')
    'model.lr must be a number, got fast'
    """
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        option = found[1].partition("=")[0]
        if option.startswith("--"):
            return unknown_option(option[2:], names)
        return f"{found[1]!r} is not expected; settings are given as --NAME VALUE"
    if found := re.search(r"does not accept option '(.+?)'", message):
        return unknown_option(found[1], names)
    if found := re.match(r"argument (\S+) --> (\S+): ", message):
        source = re.sub(r".*\((.*)\)", r"\1", found[1])  # a function of it
        return f"{found[2]} follows from {source} and cannot be set by itself"
    if found := re.match(r"argument (\S+): expected", message):
        return f"{found[1]} needs a value"
    return _value(message)


def _value(text: str, key: str = "", owner: str = "") -> str:
    """A message on the value of a setting.

    Args:
        text: the message.
        key: name of the setting.
        owner: import path of the class whose argument that is.
    """
    text = dedent(text).strip()
    if found := re.match(r'Parser key "(.+?)":\s*?\n(.*)', text, re.DOTALL):
        return _value(found[2], f"{key}.{found[1]}" if key else found[1], owner)
    if found := re.match(r"Option '(.+?)' is not accepted", text):
        takes = signature(_class(owner)).parameters
        name = found[1].rpartition(".")[2]
        hint = did_you_mean(name, takes, most=1) or f"; it takes {', '.join(takes) or 'nothing'}"
        return f"{key}: {_short(owner)} has no argument {name!r}{hint}"
    for first, body in _items(text):
        if found := re.match("Problem with given class_path '(.+?)':", first):
            return _value(body, key, found[1])
        if found := re.match("Expected a dot import path string: (.*)", first):
            kind, known = _subclasses(text)
            if not known:
                return f"{key} must be a {kind} by its class_path, got {found[1]}"
            return unknown_class(key, kind, found[1], known)
    for first, _ in _items(text):
        if found := re.match(r"(?:Import path .*|Not a valid) subclass of (\w+)", first):
            return f"{key} must be a {found[1]} by its class_path, got {_given(text)}"
    kinds = re.findall(r"Expected a (?!path but)(.+?)(?:\.? Got value|$)", text, re.M)
    if not kinds:
        return " ".join(f"{key}: {text}".removeprefix(": ").split())
    if own := _own_words(owner, key.rpartition(".")[2], _given(text)):
        return f"{key.rpartition('.')[0]}: {own}"
    return wrong_value(f"{key} of {_short(owner)}" if owner else key, kinds, _given(text))


def _own_words(owner: str, name: str, value: str) -> str | None:
    """What a class of this library itself says of an argument, which tells its range too."""
    if not owner.startswith("tdm_lightning."):
        return None
    try:
        _class(owner)(**{name: yaml.safe_load(value)})
    except TokenReductionError as error:
        return str(error)
    except (TypeError, yaml.YAMLError):  # another argument is missing, or the value is cut off
        pass
    return None


def _items(text: str) -> Iterator[tuple[str, str]]:
    """The points of a list, each with the lines that stand further in below it."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if found := re.match(r"( *)- (.*)", line):
            body = []
            for below in lines[index + 1 :]:
                if below.strip() and len(below) - len(below.lstrip()) <= len(found[1]):
                    break
                body.append(below)
            yield found[2], "\n".join(body)


def _given(text: str) -> str:
    """The value that a message quotes."""
    found = re.search(r"(?:Got|Given) value: (.*)", text)
    value = found[1] if found else "another value"
    nested = re.match(r"NestedArg\(key='.*?', val=(.*)\)$", value)
    return nested[1] if nested else value


def _kind(text: str) -> list[str]:
    """A type as a user calls it, or the values that it has.

    >>> _kind("<class 'int'>"), _kind("typing.Literal['a', 'b']")
    (['a whole number'], ['a', 'b'])
    """
    if found := re.match(r"typing.Literal\[(.*)\]$", text):
        return [value.strip("'") for value in found[1].split(", ")]
    if found := re.match(r"tuple with (\d+) elements", text):
        return [f"a list of {found[1]}"]
    name = re.sub(r"<class '(.*)'>", r"\1", text).rpartition(".")[2]
    if name in ("Optional", "Union"):  # around the others
        return []
    return [_WORDS.get(name, f"a {name}")]


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _subclasses(text: str) -> tuple[str, list[str]]:
    """The first class among the alternatives that a message lists, and the names of those that
    derive from it.
    """
    found = re.search(r"Subtypes: .*?([\w.]+\.[\w]+)[\]']", text)
    if found is None:
        return "class", []
    kind = _class(found[1])
    known = [kind]
    for one in known:  # grows meanwhile
        known += one.__subclasses__()
    return kind.__name__, sorted({one.__name__ for one in known[1:] if one.__name__[0] != "_"})


def _short(path: str) -> str:
    return path.rpartition(".")[2]
