"""``python -m benchmarks.sweep``: which of timm's models can be reduced."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from benchmarks.runner import run


def sweep(
    modules: list[str] | None = None,
    names: list[str] | None = None,
    max_params: float = 3e8,
    seed: int = 0,
    out: str = "sweep",
) -> None:
    """Try TDM on every model that timm registers in its Vision Transformer modules, with random
    weights.

    A line for each name goes to ``families.csv`` as soon as it is done, and names that have one are
    skipped unless they failed: a sweep that was broken off goes on. The summary is ``families.md``.
    Ctrl-C writes the summary of what there is and exits with code 130.

    Args:
        modules: timm modules; ``None``: those of ViTs with global attention.
        names: only names that match one of these patterns, such as ``deit_*``.
        max_params: models with more parameters are run with at most six blocks and four heads; 0:
            all models.
        seed: of weights and images.
        out: folder for the files.

    Raises:
        ValueError: if a module or pattern matches nothing, or the folder's files are something
            else.
        OSError: if the folder cannot be written.
        SystemExit: after an interrupt.
    """
    from benchmarks.sweep import Sweep, chosen, markdown, read_rows, sweep_names
    from tdm_lightning.visualize.sheet import make_folder

    pairs = chosen(modules, names)
    folder = make_folder(out)
    table, summary = folder / "families.csv", folder / "families.md"
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as progress:
        finished = sweep_names(pairs, Sweep(max_params, seed), table, progress)
    rows = read_rows(table)
    summary.write_text(markdown(rows), encoding="utf-8")
    print(
        f"{sum(row.outcome == 'reduced' for row in rows)} of {len(rows)} names reduced: {summary},"
        f" {table}"
    )
    if not finished:
        raise SystemExit(130)  # as a shell reports a program that Ctrl-C ended


if __name__ == "__main__":
    run(sweep)
