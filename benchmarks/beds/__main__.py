"""``python -m benchmarks.beds``: the results of the three beds in one table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.beds.table import collected, text
from benchmarks.runner import run
from tdm_lightning.errors import SettingError


def beds(results: str = "benchmarks/results") -> Path:
    """Write ``beds.md``: every method on every bed, in the columns those budgets that were measured
    on it.

    Args:
        results: folder with ``garments/RECIPE`` and ``scenes/RECIPE``, as ``benchmarks.study``
            writes them, and ``fidelity``, as ``benchmarks.fidelity`` does; what is missing is left
            out.

    Returns:
        The file written.

    Raises:
        ValueError: if there are no results.
    """
    folder = Path(results)
    columns = collected(folder)
    if not columns:
        raise SettingError(f"there are no results of beds in {folder}: run a bed first")
    path = folder / "beds.md"
    path.write_text(text(columns), encoding="utf-8")
    print(path)
    return path


if __name__ == "__main__":
    run(beds)
