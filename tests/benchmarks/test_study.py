"""``python -m benchmarks.study`` from the command line, on digits with a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

import tdm_lightning as tdm
from benchmarks.runner import run
from benchmarks.study import ward
from benchmarks.study.__main__ import study as study_command
from benchmarks.study.evaluate import evaluate
from benchmarks.study.finetune import Recipe
from benchmarks.study.plain import Plain
from benchmarks.study.plan import (
    Cell,
)
from benchmarks.study.run import run_cell
from benchmarks.study.store import Store, unpack_bits
from tdm_lightning.training.module import TokenReductionClassifier
from tests.helpers.studies import METHODS_BY_NAME, NAME, SHAPE, SMALL, cells_in, data


def test_cells_of_the_grid(finished):
    cells = cells_in(finished / "grid")
    assert set(cells) == {"TDM-0.7-1", "TDM-0.3-1", "EViT-0.7-1", "EViT-0.3-1"}
    for cell in cells.values():
        assert cell["tokens"][-1] < 196
        assert len(cell["diversity_after"]) == SHAPE["depth"]
        assert "accuracy_before" not in cell  # without training is a study of its own
        right = unpack_bits(cell["correct_after"], 40)
        assert right.mean() == pytest.approx(cell["accuracy_after"])
    assert not list((finished / "grid").glob("*.lock"))


def test_finished_cells_stay_and_missing_ones_are_redone(study, finished):
    folder = finished / "grid"
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    removed = folder / "TDM-0.3-1.json"
    before = json.loads(removed.read_text())
    removed.unlink()
    (folder / "TDM-0.3-1.lock").touch()  # as a process leaves it that was killed
    study(finished, "--part=grid", *SMALL)
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert {name for name in times if times[name] != now[name]} == {"TDM-0.3-1.json"}
    after = json.loads(removed.read_text())
    assert after["correct_after"] == before["correct_after"]  # the seed decides all


def test_results_with_other_settings_are_refused(study, finished):
    with pytest.raises(ValueError, match=r"other settings \(lr=0.0002 there, 0.5 now\)"):
        study(finished, "--part=grid", *SMALL, "--lr=0.5")


def test_a_cell_that_another_process_is_at_is_left_alone(tmp_path):
    store = Store(tmp_path, {})
    with FileLock(tmp_path / "one.lock"):
        with store.claimed("one") as mine:
            assert not mine
        with store.claimed("two") as mine:
            assert mine
    with store.claimed("one") as mine:
        assert mine
        store.save("one", {})
    with store.claimed("one") as mine:
        assert not mine


def test_all_methods_see_the_same_images(checkpoint, monkeypatch):
    seen: list[list[int]] = []
    step = TokenReductionClassifier.training_step

    def training_step(self, batch, batch_idx):
        assert self.model.training
        assert self.model.vit.training
        seen.append(batch[1].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TokenReductionClassifier, "training_step", training_step)
    plain, images, source = (
        Plain.read(checkpoint),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2).long()),
        data(),
    )
    for name in ("TDM", "DyViT+TDM", "Evo-ViT", "SPViT", "PS-ViT"):
        method = replace(METHODS_BY_NAME[name], solve=False)
        record = run_cell(Cell(method, 0.7, 2), plain, source, Recipe(16), images)
        assert "accuracy_after" in record
    assert len(seen) == 10
    assert seen[:2] == seen[2:4] == seen[4:6] == seen[6:8] == seen[8:]


def test_fine_tuning_with_distillation(checkpoint):
    plain, images = Plain.read(checkpoint), (torch.zeros(2, 1, 28, 28), torch.zeros(2).long())
    method = replace(METHODS_BY_NAME["WardTDM"], solve=False)
    record = run_cell(Cell(method, 0.7, 2), plain, data(), Recipe(8, distill=1.0), images)
    assert record["setting"]["class_path"] == "tdm_lightning.WardTDM"
    assert "accuracy_after" in record
    with pytest.raises(ValueError, match="distill"):
        Recipe(8, distill=-1.0)


def test_evaluation_counts_and_scores():
    import timm

    model = tdm.attach(timm.create_model(NAME, num_classes=10, **SHAPE), tdm.TopK(0.5, layers=(1,)))
    images = torch.randn(7, 1, 28, 28)
    labels = model.eval()(images).argmax(1)
    labels[2] = (labels[2] + 1) % 10
    found = evaluate(model, images, labels, batch_size=3)
    assert found.correct.tolist() == [True, True, False, True, True, True, True]
    assert found.tokens == [196] + [98] * 9
    kept = []
    model.hook_points[-1].register_forward_hook(
        lambda module, inputs, output: kept.append(output[:, 1:])
    )
    model(images)
    assert found.diversity[-1] == pytest.approx(
        tdm.metrics.diversity_score(kept[0]).mean().item(), rel=1e-4
    )


def test_a_reduced_checkpoint_is_no_plain_model(tmp_path):
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", barebones=True)
    trainer.strategy.connect(
        TokenReductionClassifier(NAME, tdm.TDM(), num_classes=10, model_kwargs=SHAPE)
    )
    trainer.save_checkpoint(tmp_path / "tdm.ckpt")
    with pytest.raises(ValueError, match="trained under TDM"):
        Plain.read(str(tmp_path / "tdm.ckpt"))
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="tdm fit"):
        Plain.read(str(tmp_path / "other.pth"))


def test_placements_at_equal_cost(study, tmp_path):
    study(
        tmp_path,
        "--part=placement",
        "--methods=[TDM,blocks 1 3 5 7 9]",
        "--rates=[0.6]",
        "--train-images=0",
        "--eval-images=20",
    )
    cells = cells_in(tmp_path / "placement")
    paper, other = cells["TDM-0.6-1"], cells["blocks 1 3 5 7 9-0.6-1"]
    assert 0.99 * paper["gmacs"] <= other["gmacs"] <= paper["gmacs"]
    assert len(set(other["tokens"])) == 6
    assert {path.name for path in run(study_command, [f"--out={tmp_path}"])} == {
        "placement.csv",
        "placement_correct.csv",
        "placement.md",
    }
    assert (
        f"| blocks 1 3 5 7 9 | {100 * other['accuracy_before']:.2f} |"
        in (tmp_path / "placement.md").read_text()
    )


def test_parts_of_wardtdm_changed_one_at_a_time(study, tmp_path, monkeypatch):
    monkeypatch.setattr(ward, "_LOOKED_AT", 4)
    names = ["WardTDM", "keys alone", "rates learned"]
    study(
        tmp_path,
        "--part=ward",
        f"--methods={names}",
        "--rates=[0.5]",
        "--train-images=0",
        "--eval-images=20",
    )
    cells = cells_in(tmp_path / "ward")
    assert len(cells) == 3
    learned, default = cells["rates learned-0.5-1"], cells["WardTDM-0.5-1"]
    assert learned["tokens"] != default["tokens"]
    assert 0.95 <= learned["gmacs"] / default["gmacs"] <= 1
    for name in ("WardTDM-0.5-1", "keys alone-0.5-1"):
        assert cells[name]["gmacs"] == pytest.approx(cells[name]["gmacs_budget"], rel=0.01)
    run(study_command, [f"--out={tmp_path}"])
    assert "| keys alone |" in (tmp_path / "ward.md").read_text()


def test_what_a_run_needs(tmp_path):
    with pytest.raises(ValueError, match="--plain FILE"):
        run(study_command, ["--part=grid", f"--out={tmp_path}"])
