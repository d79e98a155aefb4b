"""``python -m benchmarks.study`` from the command line to the figures, on digits with a tiny
model.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace

import pytest
import torch
import yaml
from filelock import FileLock

import tdm_lightning as tdm
from benchmarks.runner import run
from benchmarks.study import times, ward
from benchmarks.study.__main__ import study as study_command
from benchmarks.study.ablate import VARIANTS, ablation_cells
from benchmarks.study.evaluate import evaluate
from benchmarks.study.finetune import Recipe
from benchmarks.study.plain import Plain
from benchmarks.study.plan import (
    METHODS,
    RATES,
    Cell,
    Method,
    grid_cells,
)
from benchmarks.study.run import NoSetting, nearest, run_cell, solved
from benchmarks.study.store import Store, unpack_bits
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.slimming import select
from tdm_lightning.training.module import TokenReductionClassifier
from tests.helpers.vits import lively

NAME = "deit_tiny_patch16_224"
SHAPE = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "depth": 10,
}
DATA = {
    "dataset": "digits",
    "batch_size": 8,
    "eval_batch_size": 20,
    "num_workers": 0,
    "auto_augment": None,
    "re_prob": 0.0,
}
METHODS_BY_NAME = {method.name: method for method in METHODS}
SMALL = [
    "--methods=[TDM,EViT]",
    "--rates=[0.7,0.3]",
    "--seeds=[1]",
    "--train-images=16",
    "--eval-images=40",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As ``tdm fit`` writes it."""
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    trainer = Trainer(accelerator="cpu", barebones=True)
    trainer.strategy.connect(TokenReductionClassifier(NAME, num_classes=10, model_kwargs=SHAPE))
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def study(checkpoint, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "data.yaml"
    config.write_text(
        yaml.safe_dump(
            {"data": {"class_path": "tdm_lightning.ImageNetDataModule", "init_args": DATA}}
        )
    )

    def call(out, *extra):
        return run(
            study_command,
            ["--config", str(config), f"--plain={checkpoint}", f"--out={out}", *extra],
        )

    return call


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """The folder of a small grid."""
    out = tmp_path_factory.mktemp("out")
    study(out, "--part=grid", *SMALL)
    return out


def cells_in(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def data():
    module = ImageNetDataModule(**DATA, model=NAME, model_kwargs=SHAPE)
    module.setup("fit")
    module.setup("test")
    return module


# The plan


def test_every_cell_of_the_grid_has_its_own_name():
    cells = grid_cells(seeds=[1, 2])
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(cells) == 2 * (1 + (len(METHODS) - 1) * len(RATES))


def test_what_must_be_trained_is_left_out_where_nothing_is():
    left = {c.method.name for c in grid_cells()} - {
        c.method.name for c in grid_cells(trained=False)
    }
    assert left == {"DyViT", "DyViT+TDM", "Evo-ViT", "SPViT", "SPViT+TDM"}


def test_the_names_of_methods_are_checked():
    with pytest.raises(ValueError, match="no method Nothing.*TDM"):
        grid_cells(["Nothing"])


@pytest.mark.parametrize("rate", [0.5, 0.3])
@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.name)
def test_every_variant_of_the_ablation_fits_the_studys_model(method, rate):
    import timm

    vit = timm.create_model(NAME, img_size=28, patch_size=2, in_chans=1, embed_dim=16, num_heads=2)
    strategy = method.make(rate)
    counts = tdm.attach(vit, strategy).trace(torch.zeros(1, 1, 28, 28))[1].token_counts
    assert counts == tdm.attach(vit, tdm.TDM(rate)).trace(torch.zeros(1, 1, 28, 28))[1].token_counts


def test_clusters_only_and_matching_only_are_what_they_say():
    splits = {method.name: method.make(0.5).merger.split(196, 98) for method in VARIANTS}
    assert splits["clusters only"].pairs == 0
    assert abs(splits["clusters only"].clusters - splits["default"].clusters) <= 1
    assert splits["matching only"].clusters == 1
    assert abs(splits["matching only"].pairs - splits["default"].pairs) <= 1
    assert (splits["neither"].clusters, splits["neither"].pairs) == (1, 1)


# Settings at equal cost


@pytest.mark.parametrize(
    "method",
    [METHODS_BY_NAME[name] for name in ("Plain", "EViT", "ToMe", "Evo-ViT")],
    ids=lambda m: m.name,
)
def test_settings_meet_tdms_budget_with_the_methods_own_work(checkpoint, method):
    plain = Plain.read(checkpoint)
    strategy, costs = solved(Cell(method, 1.0 if method.name == "Plain" else 0.7, 1), plain.vit)
    report = tdm.flops.mac_report(tdm.attach(plain.vit(strategy), strategy))
    assert report.total == pytest.approx(1e9 * costs["gmacs"])
    assert report.backbone == pytest.approx(1e9 * costs["gmacs_backbone"])
    assert costs["gmacs"] == pytest.approx(costs["gmacs_budget"], rel=0.01)


def test_a_budget_that_cannot_be_met_is_a_result(checkpoint):
    cell = Cell(Method("late", lambda rate: tdm.TopK(layers=(9,))), 0.2, 1)
    images = torch.zeros(2, 1, 28, 28), torch.zeros(2).long()
    record = run_cell(cell, Plain.read(checkpoint), data(), Recipe(0), images)
    assert record["setting"] is None
    assert "TopK" in record["reason"]


# Running


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


def test_psvits_masks_come_from_training_images():
    import timm

    vit = lively(timm.create_model(NAME, num_classes=10, **SHAPE))
    given, images = (
        tdm.PSViT(0.8),
        torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
    )
    chosen = METHODS_BY_NAME["PS-ViT"].look(given, vit, [images])
    masks, placeholder = (
        tdm.attach(vit, strategy).strategy for strategy in (chosen, tdm.PSViT(0.8))
    )
    assert masks.token_counts == placeholder.token_counts
    assert not torch.equal(masks.kept, placeholder.kept)
    assert torch.equal(masks.kept, select(vit, [images], masks.token_counts).masks)


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


# The report


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


@torch.no_grad()
def test_every_part_of_wardtdm_makes_a_difference():
    import timm

    vit = lively(timm.create_model(NAME, num_classes=10, **{**SHAPE, "depth": 12})).eval()
    torch.nn.init.normal_(vit.head.weight)
    images = torch.randn(2, 1, 28, 28)
    answers = {
        method.name: tdm.attach(vit, method.make(0.5)).eval()(images)
        for method in ward.VARIANTS
        if method.look is None
    }
    different = {name: (a - answers["WardTDM"]).abs().max() for name, a in answers.items()}
    assert all(difference > 1e-4 for name, difference in different.items() if name != "WardTDM")


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        run(study_command, [f"--out={tmp_path}"])


def test_what_a_run_needs(tmp_path):
    with pytest.raises(ValueError, match="--plain FILE"):
        run(study_command, ["--part=grid", f"--out={tmp_path}"])


def test_ablation_cells():
    names = [cell.name for cell in ablation_cells()]
    assert len(set(names)) == len(names) == 2 * len(VARIANTS)


def test_methods_that_decide_image_by_image_meet_the_budget_in_the_mean(checkpoint):
    plain, images = Plain.read(checkpoint), torch.randn(4, 1, 28, 28)
    rates = [step / 20 for step in range(6, 20)]
    method = replace(METHODS_BY_NAME["MPM"], settings=[tdm.EViT(rate) for rate in rates])

    def under(strategy):
        return plain.under(strategy).model.eval()

    strategy, costs = nearest(Cell(method, 0.7, 1), plain.vit, under, images)
    budget = 1e9 * costs["gmacs_budget"]
    distance = {
        rate: abs(tdm.flops.macs_with(plain.vit(strategy), tdm.EViT(rate), total=True) - budget)
        for rate in rates
    }
    assert strategy.keep_rate == min(rates, key=distance.__getitem__)
    alone = replace(method, settings=[tdm.MPM(layers=(9,))])
    with pytest.raises(NoSetting, match="in the mean"):
        nearest(Cell(alone, 0.3, 1), plain.vit, under, images)


def test_settings_of_methods_that_decide_image_by_image_go_from_little_to_much():
    thresholds = [strategy.threshold for strategy in METHODS_BY_NAME["MaMe"].settings]
    assert thresholds == sorted(thresholds)
    blocks = [strategy.layers for strategy in METHODS_BY_NAME["MPM"].settings]
    assert (blocks[0], blocks[-1]) == (tuple(range(12)), (11,))
