"""Any function with annotated arguments as a command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from tdm_lightning.cli.configs import with_named_configs
from tdm_lightning.cli.mistakes import unwrapped
from tdm_lightning.cli.stored import differences, fill_in, option_value

#: A whole number, or a list of them.
_NUMBERS = r"\d+|\[\d+(,\d+)*\]"


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
    parser = ArgumentParser(prog=title, description=summary)
    parser.add_argument("--config", action="config", help="file with any of the settings below")
    parameters = signature(function).parameters
    # Arguments without a default are lists of files, given without a flag.
    files = [key for key, value in parameters.items() if value.default is Parameter.empty]
    for key in files:
        parser.add_argument(key, nargs="+", help="one or more files")
    parser.add_function_arguments(function, skip=set(files), as_group=False)
    arguments = with_named_configs(_listed([_underscored(argument) for argument in arguments]))
    parsed = _with_stored(title, parser, list(parameters), arguments)
    with unwrapped():
        settings = parser.instantiate_classes(parsed).as_dict()
    return function(**{key: settings[key] for key in parameters})


def _with_stored(
    title: str, parser: ArgumentParser, parameters: list[str], arguments: list[str]
) -> Namespace:
    def parse() -> Namespace:
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


def _listed(arguments: list[str]) -> list[str]:
    """Whole numbers that follow an option as one list: ``--sizes 1 32`` is ``--sizes=[1,32]``."""
    found: list[str] = []
    for argument in arguments:
        name, equals, value = found[-1].partition("=") if found else ("", "", "")
        if argument.isdecimal() and name.startswith("--") and not equals:
            found[-1] = f"{name}={argument}"
        elif argument.isdecimal() and name.startswith("--") and re.fullmatch(_NUMBERS, value):
            found[-1] = f"{name}=[{value.strip('[]')},{argument}]"
        else:
            found.append(argument)
    return found


def _underscored(argument: str) -> str:
    """An option's name as our functions spell it: ``--match-gmacs=3`` is ``--match_gmacs=3``."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value
