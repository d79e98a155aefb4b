"""The ``tdm`` command: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict``, and the
library's own commands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from tdm_lightning.cli.configs import named_configs, with_current_configs, with_named_configs
from tdm_lightning.cli.mistakes import UsageError
from tdm_lightning.cli.options import (
    check_class,
    check_options,
    function_options,
    trainer_options,
    underscored,
)
from tdm_lightning.errors import TokenReductionError, did_you_mean

#: Our own commands: name → (module, function, summary). Imported when called, so that help stays
#: quick.
COMMANDS = {
    "compare": ("tdm_lightning.cli.compare", "compare", "Time methods against each other."),
    "export": (
        "tdm_lightning.cli.export",
        "export",
        "Write a model for ONNX Runtime, torch.export or the hub.",
    ),
    "models": (
        "tdm_lightning.cli.models",
        "models",
        "List the models that can be reduced, of every library.",
    ),
    "rates": (
        "tdm_lightning.cli.rates",
        "rates",
        "Learn how many tokens each block should leave at a budget.",
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

#: Options of 0.1.0, and what they are called now.
_RENAMED = {
    "--model.pretrained": "--model.weights true",
    "--model.checkpoint": "--model.weights",
    "--pretrained": "--weights true",
    "--checkpoint": "--weights",
    "--from_pretrained": "--weights",
    "--ckpt": "--weights",
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
        The ``LightningCLI`` for ``fit`` and its like, or what the library's own command returns.

    Raises:
        SystemExit: with code 2 for what the user can mend: arguments that cannot be parsed, and the
            library's own errors, which are printed in one line. Given ``args``, those are raised.
            Every other exception is a bug and keeps its traceback.
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
    known = [*_TRAINER, *COMMANDS]
    # LightningCLI also takes a configuration of several commands in front of the command.
    in_front = command.startswith("-") and set(_TRAINER) & set(arguments)
    if command not in known and not in_front:
        hint = did_you_mean(command, known, most=1) or f"; the commands are {', '.join(known)}"
        _stop("", f"unknown command {command!r}{hint}")
    _refuse_renamed(command, arguments)
    try:
        if command in COMMANDS:
            return _run_own(command, arguments[1:])
        return _run_trainer(command, arguments, model_class, datamodule_class)
    except TokenReductionError as error:
        if args is not None and not isinstance(error, UsageError):
            raise
        _stop(command, str(error), error)


def _run_own(command: str, arguments: list[str]) -> Any:
    module, name, summary = COMMANDS[command]
    given = with_named_configs(underscored(arguments))
    check_options(given, function_options(module, name))
    _know_classes(given, "strategy")
    from tdm_lightning.cli.runner import run_function

    function = getattr(import_module(module), name)
    return run_function(f"tdm {command}", summary, function, arguments)


def _run_trainer(
    command: str,
    arguments: list[str],
    model_class: type | None,
    datamodule_class: type | None,
) -> Any:
    arguments = with_named_configs(arguments)
    if command in _TRAINER and model_class is None and datamodule_class is None:
        check_options(arguments, trainer_options(command))
    _know_classes(arguments, "model.strategy")
    from tdm_lightning.cli.trainer import run

    return run(with_current_configs(arguments), model_class, datamodule_class)


def _know_classes(arguments: Sequence[str], option: str) -> None:
    """Import what short names of classes may mean, and check that of the strategy before Lightning
    is imported.
    """
    # Not above: usage errors are told without them.
    from tdm_lightning.core.plugins import load_plugins
    from tdm_lightning.strategies import Strategy

    load_plugins()
    known = [one.__name__ for one in Strategy.known().values()]
    check_class(arguments, option, "Strategy", known)


def entry() -> None:
    """The console script: :func:`main` on the process's arguments."""
    main()


def _stop(command: str, message: str, cause: Exception | None = None) -> NoReturn:
    """Print one line and end with code 2."""
    prefix = f"tdm {command}" if command else "tdm"
    print(f"{prefix}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from cause


def _refuse_renamed(command: str, arguments: Sequence[str]) -> None:
    """Tell the new name of an option that 0.1.0 had."""
    renamed = dict(_RENAMED)
    if command in COMMANDS:
        renamed["--ckpt_path"] = "--weights"
    for argument in arguments:
        option = argument.partition("=")[0]
        if option in renamed:
            _stop(command, f"{option} is {renamed[option]} now: a file, a folder, or a hub name")


def _overview() -> str:
    rows = [
        *_TRAINER.items(),
        *((name, summary) for name, (_, _, summary) in COMMANDS.items()),
    ]
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        "usage: tdm COMMAND [--config NAME_OR_FILE …] [--SETTING VALUE"
        f" …]\n\ncommands:\n{lines}\n\n`tdm COMMAND --help` lists the settings. Named"
        f" configurations: {', '.join(named_configs())}"
    )
