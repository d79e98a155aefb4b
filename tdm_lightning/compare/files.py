"""The comparison's files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tdm_lightning.compare.plot import draw, draw_accuracy, rated
from tdm_lightning.compare.run import Comparison
from tdm_lightning.compare.table import csv_text, markdown


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.md``, ``compare.csv``, ``compare.png`` and, where accuracy is known,
    ``accuracy.png``; all are complete before the first appears in the folder.
    """
    rows, facts = comparison.rows(), comparison.facts
    with tempfile.TemporaryDirectory(dir=folder) as name:
        draft = Path(name)
        (draft / "compare.md").write_text(
            markdown(rows, facts, comparison.remarks()), encoding="utf-8"
        )
        (draft / "compare.csv").write_text(csv_text(rows, facts), encoding="utf-8")
        title = f"{facts['model']}\n{facts['device']}"
        draw(draft / "compare.png", rows, title)
        if any(map(rated, rows)):
            draw_accuracy(draft / "accuracy.png", rows, title)
        written = [folder / path.name for path in sorted(draft.iterdir())]
        for path in written:
            os.replace(draft / path.name, path)
    return written
