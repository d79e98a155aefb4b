"""``python -m benchmarks.digits``: every method on scikit-learn's digits, by the command line."""

from __future__ import annotations

from pathlib import Path

from benchmarks.digits.rows import PLAIN, ROWS, Row
from benchmarks.runner import run
from tdm_lightning.cli import main
from tdm_lightning.core.tables import append_csv, read_csv
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.sheet import make_folder


def digits(
    methods: list[str] | None = None,
    epochs: int | None = None,
    plain: str | None = None,
    out: str = "digits",
) -> Path:
    """Train and test methods on digits as the quickstart does; one row each in a table.

    Methods that start from a trained model take the plain run's. A row that is there is not made
    again.

    Args:
        methods: only these; ``None``: all.
        epochs: so many in place of each method's own, to try it.
        plain: checkpoint of a plain run; ``None``: that of this folder, made first.
        out: folder for the runs and ``digits.csv``.

    Returns:
        The table.

    Raises:
        ValueError: for a method that is not known.
    """
    known = [row.name for row in ROWS]
    if unknown := set(methods or ()) - set(known):
        raise SettingError(f"unknown methods {sorted(unknown)}; known are {', '.join(known)}")
    folder = make_folder(out)
    table = folder / "digits.csv"
    done = {row["method"] for row in read_csv(table)}
    chosen = [row for row in ROWS if methods is None or row.name in methods]
    start = plain or str(folder / "plain" / "best.ckpt")
    if plain is None and not Path(start).exists() and any(PLAIN in " ".join(r.fit) for r in chosen):
        chosen = [ROWS[0], *(row for row in chosen if row is not ROWS[0])]
    for row in chosen:
        if row.name not in done:
            top1 = _accuracy(row, folder / row.name, start, epochs)
            append_csv(table, {"method": row.name, "top1": f"{top1:.4f}"})
    print(table.read_text(encoding="utf-8"))
    return table


def _accuracy(row: Row, folder: Path, plain: str, epochs: int | None) -> float:
    """Top-1 on the test images."""
    keep = [
        "--trainer.callbacks=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={folder}",
        "--trainer.callbacks.filename=best",
        "--trainer.callbacks.monitor=val/top1",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.enable_version_counter=false",
    ]
    brief = [] if epochs is None else [f"--trainer.max_epochs={epochs}", "--model.warmup_epochs=0"]
    brief += [] if epochs is None else [f"--trainer.check_val_every_n_epoch={epochs}"]
    quiet = ["--trainer.logger=false", f"--trainer.default_root_dir={folder}"]
    given = [option.replace(PLAIN, plain) for option in row.fit]
    main(["fit", "--config", "quickstart", *given, *quiet, *keep, *brief])
    weights = f"{folder / 'best.ckpt'}"
    source = f"--model.weights={weights}" if row.tests_weights else f"--ckpt_path={weights}"
    common = ["--config", "quickstart", *row.test, *quiet, "--trainer.callbacks=null"]
    tested = main(["test", *common, source])
    return float(tested.trainer.callback_metrics["test/top1"])


if __name__ == "__main__":
    run(digits)
