"""The reference in docs/ holds every public name, each once."""

import functools
import importlib
import re
import types
from collections import Counter
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = "tdm_lightning"
ROOMS = (
    *("callbacks", "checkpoints", "compare", "core", "data", "export", "flops", "importance"),
    *("mergers", "metrics", "rates", "schedules", "slimming", "sparsity", "strategies"),
    *("training", "visualize", "vit", "errors", "hub", "budget"),
)


def documented():
    """What a page names for autodoc, as dotted names."""
    for path in (*DOCS.glob("reference/*.md"), *DOCS.glob("methods/*.md")):
        yield from re.findall(r"^\.\. auto\w+:: (\S+)$", path.read_text("utf-8"), re.MULTILINE)


def public(module):
    """The names of a module for its users: those it lists, or those of its own."""
    listed = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    values = {name: getattr(module, name) for name in listed if not name.startswith("_")}
    # Rooms have their own row; a type variable is nobody's business.
    kinds = (types.ModuleType,)
    return {n: v for n, v in values.items() if not isinstance(v, kinds) and n != "T"}


def resolve_name(dotted):
    """By attributes alone: some functions have the name of their module."""
    package, *names = dotted.split(".")
    importlib.import_module(f"{package}.{names[0]}" if names[:1] and names[0] in ROOMS else package)
    return functools.reduce(getattr, names, importlib.import_module(package))


def test_what_is_documented_is_there_once():
    names = Counter(documented())
    assert [name for name, count in names.items() if count > 1] == []
    assert all(resolve_name(name) is not None for name in names)


@pytest.mark.parametrize("room", ["", *ROOMS, "kernels"])
def test_every_public_name_is_documented(room):
    module = resolve_name(f"{PACKAGE}.{room}".rstrip("."))
    # By what a name stands for: most are public in a room and in the package.
    values = [resolve_name(name) for name in documented()]
    missing = [
        name
        for name, value in public(module).items()
        if not any(value is one or (type(value) is tuple and value == one) for one in values)
    ]
    assert missing == []
