"""The ``tdm`` command: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict``, and the
library's own subcommands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from tdm_lightning.cli.configs import named_configs, with_named_configs

#: Our own subcommands: name → (module, function, summary). Imported when called, so that help
#: stays quick.
COMMANDS = {
    "compare": ("tdm_lightning.cli.compare", "compare", "Time methods against each other."),
    "export": (
        "tdm_lightning.cli.export",
        "export",
        "Write a model for ONNX Runtime, torch.export or the hub.",
    ),
    "slim": (
        "tdm_lightning.cli.slim",
        "slim",
        "Find the patches that each block must compute (PS-ViT).",
    ),
    "visualize": (
        "tdm_lightning.cli.visualize",
        "visualize",
        "Draw what becomes of an image's patches.",
    ),
}
_TRAINER = {
    "fit": "Train, and validate after each epoch.",
    "validate": "Evaluate on the validation split.",
    "test": "Evaluate on the test split.",
    "predict": "Write class probabilities to a CSV file.",
}


def main(
    args: Sequence[str] | None = None,
    model_class: type | None = None,
    datamodule_class: type | None = None,
) -> Any:
    """Run the command line.

    Args:
        args: the arguments; ``None``: those of the process.
        model_class: your subclass of :class:`~tdm_lightning.TokenReductionClassifier`, to get this
            command line for it.
        datamodule_class: likewise for :class:`~tdm_lightning.ImageNetDataModule`.

    Returns:
        The ``LightningCLI`` for ``fit`` and its like, or what the library's own subcommand returns.

    Raises:
        SystemExit: with code 2 if the arguments cannot be parsed, 1 if a setting or the data is
            wrong.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_overview())
        return None
    if command == "--version":
        from tdm_lightning.version import __version__

        print(f"tdm-lightning {__version__}")
        return None
    try:
        if command in COMMANDS:
            return _run_command(command, arguments[1:])
        return _run_trainer(arguments, model_class, datamodule_class)
    except (ValueError, TypeError, OSError) as error:
        # A wrong setting, file or data set: the message says it all. Anything else is a bug and
        # keeps its traceback.
        print(f"tdm {command}: error: {error}", file=sys.stderr)
        if args is not None:
            raise
        raise SystemExit(1) from error


def entry() -> None:
    """The console script: :func:`main` on the process's arguments."""
    main()


def _run_trainer(
    arguments: list[str], model_class: type | None, datamodule_class: type | None
) -> Any:
    if arguments[0] not in _TRAINER and not arguments[0].startswith("-"):
        known = ", ".join([*_TRAINER, *COMMANDS])
        print(
            f"tdm: error: unknown command {arguments[0]!r}; the commands are {known}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from tdm_lightning.cli.trainer import run

    return run(with_named_configs(arguments), model_class, datamodule_class)


def _run_command(command: str, arguments: list[str]) -> Any:
    from jsonargparse import ArgumentParser

    module, name, summary = COMMANDS[command]
    function: Callable[..., Any] = getattr(import_module(module), name)
    parser = ArgumentParser(prog=f"tdm {command}", description=summary)
    parser.add_argument("--config", action="config", help="file with any of the settings below")
    # Arguments without a default are lists of files, given without a flag.
    files = [
        key
        for key, value in signature(function).parameters.items()
        if value.default is Parameter.empty
    ]
    for key in files:
        parser.add_argument(key, nargs="+", help="one or more files")
    parser.add_function_arguments(function, skip=set(files), as_group=False)
    arguments = with_named_configs([_underscored(argument) for argument in arguments])
    settings = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    return function(**{key: settings[key] for key in signature(function).parameters})


def _underscored(argument: str) -> str:
    """An option's name as our functions spell it: ``--match-gmacs=3`` is ``--match_gmacs=3``."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _overview() -> str:
    rows = [*_TRAINER.items(), *((name, summary) for name, (_, _, summary) in COMMANDS.items())]
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        "usage: tdm COMMAND [--config NAME_OR_FILE …] [--SETTING VALUE"
        f" …]\n\ncommands:\n{lines}\n\n`tdm COMMAND --help` lists the settings. Named"
        f" configurations: {', '.join(named_configs())}"
    )
