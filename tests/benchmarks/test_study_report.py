"""The tables and figures of a small study."""

import csv
import os

import pytest

from benchmarks.runner import run
from benchmarks.study import times
from benchmarks.study.__main__ import study as study_command
from tests.helpers.studies import cells_in


def test_report_redraws_from_the_tables_alone(study, finished, tmp_path):
    study(
        finished,
        "--part=ablation",
        "--methods=[default,match_weights=mean]",
        "--train-images=0",
        "--eval-images=20",
    )
    written = {path.name for path in run(study_command, [f"--out={finished}"])}
    pictures = {"accuracy.png", "keep_rates.png", "diversity.png"}
    texts = {"grid.md", "ablation.md"}
    tables = {f"{part}{end}.csv" for part in ("grid", "ablation") for end in ("", "_correct")}
    assert written == pictures | texts | tables
    for name in tables:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    assert {path.name for path in run(study_command, [f"--out={tmp_path}"])} == pictures | texts
    for name in texts:
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    assert all(os.path.getsize(tmp_path / name) > 10_000 for name in pictures)


def test_tables_say_what_the_cells_say(finished):
    run(study_command, [f"--out={finished}"])
    cells = cells_in(finished / "grid")
    with (finished / "grid.csv").open() as file:
        rows = {(row["method"], row["rate"]): row for row in csv.DictReader(file)}
    assert float(rows["EViT", "0.3"]["gmacs"]) == cells["EViT-0.3-1"]["gmacs"]
    text = (finished / "grid.md").read_text()
    lead = 100 * (cells["TDM-0.3-1"]["accuracy_after"] - cells["EViT-0.3-1"]["accuracy_after"])
    assert f"| TDM | {100 * cells['TDM-0.7-1']['accuracy_after']:.2f} |" in text
    assert f"{lead:+.2f} (" in text


def test_times_stand_beside_accuracies(study, finished, monkeypatch):
    monkeypatch.setattr(times, "ROUNDS", 2)
    study(finished, "--part=times", "--methods=[TDM]", "--rates=[0.3]")
    study(finished, "--part=times", "--methods=[TDM,EViT]", "--rates=[0.3]")
    rows = (finished / "times.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["TDM", "EViT"]  # each once
    found = times.read_times(finished / "times.csv")
    assert all(0 < speed.q1 <= speed.median <= speed.q3 for speed in found.values())
    assert finished / "time.png" in run(study_command, [f"--out={finished}"])


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        run(study_command, [f"--out={tmp_path}"])
