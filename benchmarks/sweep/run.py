"""Go over timm's names, one after the other, and keep what there is."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress

from benchmarks.sweep.examine import examine, randomize, reduction
from benchmarks.sweep.names import Facts, facts_of, outlined
from benchmarks.sweep.shrink import Arguments, shrinking, shrunk_text
from benchmarks.sweep.table import Row, append_row, read_rows, write_rows
from tdm_lightning.errors import SettingError
from tdm_lightning.vit.adapters import input_size
from tdm_lightning.vit.attach import attach


@dataclass(frozen=True)
class Sweep:
    """How models are tried.

    Attributes:
        max_params: larger models are shrunk; 0: all.
        seed: of weights and images.
    """

    max_params: float = 3e8
    seed: int = 0

    @property
    def settings(self) -> str:
        """What rows of one table must have in common."""
        shrunk = (
            f"models above {self.max_params / 1e6:g} M parameters"
            if self.max_params
            else "every model"
        )
        return (
            f"{shrunk} shrunk, seed {self.seed}, timm {timm.__version__}, torch {torch.__version__}"
        )


def sweep_names(
    pairs: Sequence[tuple[str, str]], sweep: Sweep, path: Path, progress: Progress | None = None
) -> bool:
    """Try the names that a CSV file does not hold yet, or holds as failed; each becomes a row of it
    when it is done.

    An interrupt (Ctrl-C) ends the sweep and keeps the rows.

    Args:
        pairs: (module, name).
        sweep: how.
        path: the file, made if it is missing.
        progress: where to show a bar.

    Returns:
        Whether the sweep came to its end.

    Raises:
        ValueError: if the file is some other table, or its rows were made with other settings.
    """
    rows = read_rows(path)
    other = next((row.settings for row in rows if row.settings != sweep.settings), None)
    if other is not None:
        raise SettingError(
            f"{path} was made with {other}, not with {sweep.settings}; choose another folder, or"
            " delete it"
        )
    rows = [row for row in rows if row.outcome != "failed"]
    write_rows(path, rows)  # also without a line that was cut off
    done = {row.name for row in rows}
    progress = progress or Progress(disable=True)
    task = progress.add_task("sweep", total=len(pairs))
    try:
        for module, name in pairs:
            progress.update(task, description=name)
            if name not in done:
                append_row(path, try_name(module, name, sweep))
            progress.advance(task)
    except KeyboardInterrupt:
        return False
    return True


def try_name(module: str, name: str, sweep: Sweep) -> Row:
    """What becomes of one name; whatever its model does is a finding, not an error."""
    row = Row(name, module, settings=sweep.settings)
    try:
        outline = outlined(name)
        facts = facts_of(outline)
        arguments = shrinking(facts) if facts.parameters > sweep.max_params else {}
        row = _described(row, facts, arguments)
        refusal = _refusal(outline)
        return (
            _examined(row, arguments, sweep.seed)
            if refusal is None
            else replace(row, outcome="refused", reason=refusal)
        )
    except Exception as error:
        return replace(row, reason=f"{type(error).__name__}: {_line(error)}".removesuffix(": "))
    finally:
        gc.collect()  # modules that refer to themselves would keep their memory until much later


def _refusal(vit: Any) -> str | None:
    try:
        attach(vit, reduction(vit))
    except (TypeError, ValueError) as error:
        return _line(error)
    return None


def _described(row: Row, facts: Facts, arguments: Arguments) -> Row:
    return replace(
        row,
        kind=facts.kind,
        block=facts.block,
        attention=facts.attention,
        depth=facts.depth,
        parameters=facts.parameters,
        shrunk=shrunk_text(facts, arguments),
    )


def _examined(row: Row, arguments: Arguments, seed: int) -> Row:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit: Any = timm.create_model(row.name, **arguments).eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(vit, generator)
    channels, height, width = input_size(vit)
    found = examine(vit, torch.randn(1, channels, height, width, generator=generator))
    return replace(
        row,
        image=f"{height}×{width}",
        outcome="failed" if found.problems else "reduced",
        patches=found.tokens[0],
        remaining=found.tokens[-1],
        identity_gap=found.identity,
        shuffled_gap=found.shuffled,
        stray_gap=found.stray,
        reduced_gap=found.reduced,
        reason="; ".join(found.problems),
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
