"""``python -m benchmarks.models``: what can be done with each library's models."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import track

from benchmarks.runner import run


def models(trials: list[str] | None = None, out: str = "docs/supported.md") -> None:
    """Try a tiny model of every class that can be reduced, and write the table.

    Args:
        trials: names of some; ``None``: all of them.
        out: the file to write.

    Raises:
        ValueError: if there is no such trial, or the file cannot be written.
    """
    from benchmarks.models.table import markdown
    from benchmarks.models.tiny import tiny
    from benchmarks.models.trials import TRIALS, outcome
    from tdm_lightning.cli.models import library_of
    from tdm_lightning.core.checks import check_choice
    from tdm_lightning.vit.adapters import class_names

    chosen = [check_choice(name, tuple(TRIALS), "trials") for name in trials or TRIALS]
    paths = [path for path in class_names() if library_of(path) is not None]
    found: dict[str, dict[str, str]] = {}
    console = Console(stderr=True)
    for path in track(paths, "models", console=console, disable=not sys.stderr.isatty()):
        vit, found[path] = tiny(path), {}
        for name in chosen:
            found[path][name] = outcome(TRIALS[name], vit)
            if found[path][name] != "yes":
                console.print(f"{path}, {name}: {found[path][name]}", markup=False)
        with open(out, "w", encoding="utf-8") as file:  # whole after every class
            file.write(markdown(found))
    print(out)


if __name__ == "__main__":
    run(models)
