"""Any function with annotated arguments as a command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from tdm_lightning.cli.configs import with_current_configs, with_named_configs
from tdm_lightning.cli.mistakes import translated, unwrapped
from tdm_lightning.cli.options import underscored
from tdm_lightning.cli.stored import differences, fill_in, option_value


def run_function(
    title: str, summary: str, function: Callable[..., Any], arguments: list[str]
) -> Any:
    """Parse arguments by a function's signature and call it.

    Where the function takes ``weights`` and these say what model they are of, that fills in what is
    not given of its arguments ``model``, ``model_kwargs`` and ``strategy``.

    Args:
        title: the command, for messages.
        summary: what it does, for its help.
        function: what to call.
        arguments: of the command line.
    """
    parser = ArgumentParser(prog=title, description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="file with any of the settings below")
    parameters = signature(function).parameters
    # Arguments without a default are lists of files, given without a flag.
    files = [key for key, value in parameters.items() if value.default is Parameter.empty]
    for key in files:
        parser.add_argument(key, nargs="+", help="one or more files")
    parser.add_function_arguments(function, skip=set(files), as_group=False)
    arguments = _listed(underscored(arguments), _words(function))
    arguments = with_current_configs(with_named_configs(arguments))
    parsed = _with_stored(title, parser, list(parameters), arguments)
    with unwrapped():
        settings = parser.instantiate_classes(parsed).as_dict()
    return function(**{key: settings[key] for key in parameters})


def _with_stored(
    title: str, parser: ArgumentParser, parameters: list[str], arguments: list[str]
) -> Namespace:
    def parse() -> Namespace:
        with translated(lambda: parser.get_defaults(skip_validation=True).keys()):
            return parser.parse_args(arguments)

    weights = option_value(arguments, "weights", "") if "weights" in parameters else None
    if weights is None or weights.lower() in ("true", "false"):
        return parse()
    from tdm_lightning.checkpoints import open_weights

    stored = open_weights(weights).stored
    if stored is None or stored.model is None:
        return parse()
    found = {
        "model": stored.model,
        "model_kwargs": stored.model_kwargs,
        "strategy": stored.strategy,
    }
    found = {key: value for key, value in found.items() if key in parameters}
    settings = fill_in(parser, parse, found, "strategy")
    if differing := differences(settings, found):
        text = "; ".join(differing).replace("in the file", f"in {weights}")
        print(f"{title}: {text}", file=sys.stderr)
    return settings


def _words(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """The words that an option takes, by its flag, where it takes a list of them."""
    given = {key: kind for key, kind in function.__annotations__.items() if key != "return"}
    names = vars(sys.modules[function.__module__])
    found = {}
    for name, kind in get_type_hints(SimpleNamespace(__annotations__=given), names).items():
        for option in get_args(kind):
            if get_origin(option) is list and get_origin(item := get_args(option)[0]) is Literal:
                found[f"--{name}"] = get_args(item)
    return found


def _listed(arguments: list[str], words: Mapping[str, Sequence[str]]) -> list[str]:
    """Whole numbers, or an option's words, that follow it as one list: ``--sizes 1 32`` is
    ``--sizes=[1,32]``.
    """
    found: list[str] = []
    for argument in arguments:
        name, equals, value = found[-1].partition("=") if found else ("", "", "")
        items = [*value.strip("[]").split(","), argument] if equals else [argument]
        if name.startswith("--") and all(
            item.isdecimal() or item in words.get(name, ()) for item in items
        ):
            found[-1] = f"{name}=[{','.join(items)}]" if equals else f"{name}={argument}"
        else:
            found.append(argument)
    return found
