"""The example programs run as they stand and print sensible figures."""

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.manual_seed(0)


def test_there_is_none_without_a_test():
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        "clip_tower",
        "fabric",
        "huggingface",
        "plain_loop",
        "segmentation",
    }
    assert all(
        len(path.read_text(encoding="utf-8").splitlines()) <= 30 for path in FOLDER.glob("*.py")
    )


@pytest.mark.parametrize("name", ["plain_loop", "fabric"])
def test_loops(name):
    names = runpy.run_path(str(FOLDER / f"{name}.py"))
    assert names["loss"] < 2  # ten classes: 2.3 by chance
    scores = names["recorder"].compute()
    assert len(scores) == 4
    assert all(score > 0 for score in scores)
    assert not any(tap._forward_hooks for tap in names["model"].hook_points)


def test_segmentation():
    names = runpy.run_path(str(FOLDER / "segmentation.py"))
    assert names["features"].shape == (1, 64, 12, 18)
    assert names["both"].sum() > 0.6 * names["either"].sum()
    assert names["model"].trace(names["images"])[1].token_counts[-1] < 12 * 18


def test_a_clip_style_tower():
    names = runpy.run_path(str(FOLDER / "clip_tower.py"))
    assert names["hits"].float().mean() > 0.2  # ten names: 0.1 by chance
    trunk = names["clip"].visual.trunk
    assert names["tdm"].detach(names["clip"]).visual.trunk is trunk.vit


def test_hugging_faces_trainer():
    names = runpy.run_path(str(FOLDER / "huggingface.py"))
    trainer, vit = names["trainer"], names["trainer"].model.vit
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first["eval_loss"] < 2.28
    assert [first[f"eval_tokens/block_{index:02d}"] for index in range(4)] == [16, 12, 9, 9]
    assert first["eval_flops/reduction"] > 0.2
    recorder = names["tdm"].recorder.DiversityRecorder(vit)
    batch = torch.stack([item["pixel_values"] for item in names["data"][:8]])
    with recorder, torch.no_grad():
        vit.eval()(batch)
    again = trainer.predict(names["data"][:8])
    assert again.predictions.shape == (8, 10)
    callback = names["TokenReductionCallback"](max_batches=1)
    assert callback.max_batches == 1
    metrics = trainer.evaluate(names["data"][:8])
    for index, score in enumerate(recorder.compute()):
        assert metrics[f"eval_diversity/block_{index:02d}"] == pytest.approx(score.item(), rel=1e-4)
