"""The three beds in one table."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.beds.__main__ import beds
from benchmarks.beds.table import collected
from benchmarks.fidelity import table as fidelity_table
from benchmarks.fidelity.measure import Fidelity
from benchmarks.runner import run
from benchmarks.study.plan import METHODS
from benchmarks.study.results import collect
from benchmarks.study.store import Store, pack_bits

ENVIRONMENT = {"device": "cpu", "threads": "1", "versions": ""}


def cell(folder, method, rate, wrong, when="before", seed=1):
    """A finished cell of 200 images of which the first ``wrong`` are wrong."""
    correct = np.arange(200) >= wrong
    record = {
        "method": method,
        "rate": rate,
        "seed": seed,
        "setting": {"class_path": "tdm_lightning.Strategy", "init_args": {}},
        "gmacs": 0.1,
        "images": 200,
        "environment": ENVIRONMENT,
        f"accuracy_{when}": correct.mean(),
        f"correct_{when}": pack_bits(correct),
    }
    Store(folder / "grid", {}).save(f"{method}-{rate:g}-{seed}", record)


@pytest.fixture
def results(tmp_path):
    free, tuned = tmp_path / "scenes" / "free", tmp_path / "garments" / "3000"
    cell(free, "Plain", 1.0, 20)
    for rate in (0.5, 0.3):
        cell(free, "WardTDM", rate, 24)
        cell(free, "ToMe", rate, 60)
        cell(free, "TDM", rate, 25)
    for seed in (1, 2):
        cell(tuned, "WardTDM", 0.3, 40 + seed, "after", seed)
        cell(tuned, "ToMe", 0.3, 10 + seed, "after", seed)
    for folder in (free, tuned):
        collect(folder, "grid", METHODS)
    (tmp_path / "fidelity").mkdir()
    for draw in (1, 2):
        for method, distance in (("WardTDM", 0.02), ("TDM", 0.3), ("ToMe (rate)", 0.02)):
            crops = (distance + np.linspace(0, 0.01, 8)).tolist()
            one = Fidelity(method, 0.3, 1.0, draw, crops, crops)
            fidelity_table.add(tmp_path / "fidelity" / "fidelity.csv", one)
    return tmp_path


def test_one_table_of_three_beds(results):
    text = run(beds, [f"--results={results}"]).read_text()
    free, tuned = (part.splitlines() for part in text.split("**") if part.startswith("\n\n|"))
    assert free[2].count("|") == 2 + 4
    lines = {line.split("|")[1].strip(): line for line in (*free, *tuned) if line.startswith("|")}
    assert "| 88.00 | 88.00 | 2.50 | 2.50 |" in next(x for x in free if "WardTDM" in x)
    assert "| 90.00 | 90.00 | – | – |" in lines["Plain"]
    assert "| 70.00 ▼ | 70.00 ▼ | – | – |" in next(x for x in free if "| ToMe |" in x)
    assert "| 87.50 | 87.50 | 30.50 ▼ | 30.50 ▼ |" in next(x for x in free if "| TDM |" in x)
    assert "| – | – | 2.50 | 2.50 |" in lines["ToMe (rate)"]
    assert "94.25 ▲" in next(x for x in tuned if "| ToMe |" in x)


def test_leads_are_paired(results):
    found = {(c.bed, c.recipe, c.rate): c for c in collected(results)}
    lead = found["Fashion-MNIST", "fine-tuned on 3,000 images", 0.3].leads["ToMe"]
    assert lead.mean == pytest.approx(-30 / 200)
    assert lead.low < lead.mean < lead.high < 0


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(ValueError, match="run a bed first"):
        run(beds, [f"--results={tmp_path}"])
