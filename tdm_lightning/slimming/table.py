"""What a search found, as a table."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from tdm_lightning.core import tables
from tdm_lightning.flops import mac_report
from tdm_lightning.slimming.search import Slimmed
from tdm_lightning.strategies import Strategy
from tdm_lightning.vit import attach

COLUMNS = ("block", "patches", "error", "tuned", "GMACs", "plain GMACs")


def rows(slimmed: Slimmed) -> list[tuple[str, ...]]:
    """A line for each block, counted from 0, and one for the whole model; errors are relative,
    GMACs per image.
    """
    plain = attach(slimmed.model.vit, Strategy())
    before, after = mac_report(plain), mac_report(slimmed.model)
    lines = []
    for block, was, now in zip(slimmed.blocks, before.blocks, after.blocks, strict=True):
        cost = [f"{(macs.attention + macs.mlp) / 1e9:.4g}" for macs in (now, was)]
        lines.append(
            (
                str(block.index),
                str(block.patches),
                f"{block.error:.5f}",
                "yes" if block.tuned else "no",
                *cost,
            )
        )
    total = [f"{report.backbone / 1e9:.4g}" for report in (after, before)]
    return [*lines, ("model", "", f"{slimmed.error:.5f}", "", *total)]


def rich_table(slimmed: Slimmed) -> Table:
    """For the terminal."""
    return tables.terminal(COLUMNS, rows(slimmed))


def write_csv(slimmed: Slimmed, path: Path) -> None:
    """For other programs."""
    tables.write_csv(path, [dict(zip(COLUMNS, row, strict=True)) for row in rows(slimmed)])
