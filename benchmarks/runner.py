"""Run a benchmark as a command: ``python -m benchmarks.NAME``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tdm_lightning.cli.runner import run_function
from tdm_lightning.errors import TokenReductionError


def run(function: Callable[..., Any], args: Sequence[str] | None = None) -> Any:
    """Parse arguments by a function's signature and call it.

    Args:
        function: a benchmark; the first line of its docstring is its help.
        args: the arguments; ``None``: those of the process.

    Raises:
        SystemExit: with code 2 for what the user can mend. Given ``args``, these errors are raised.
    """
    title = f"python -m benchmarks.{function.__name__}"
    summary = (function.__doc__ or "").partition("\n\n")[0]
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        return run_function(title, summary, function, arguments)
    except (TokenReductionError, FileNotFoundError) as error:
        if args is not None:
            raise
        print(f"{title}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
