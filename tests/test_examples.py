"""The example programs run as they stand and print sensible figures."""

import importlib
import runpy
from pathlib import Path

import pytest
import torch

from tdm_lightning.cli import main

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
        "merger_of_your_own",
        "strategy_of_your_own",
        "plain_loop",
        "segmentation",
        "vit_of_your_own",
    }


@pytest.mark.parametrize("name", ["plain_loop", "fabric"])
def test_loops(name):
    names = runpy.run_path(str(FOLDER / f"{name}.py"))
    assert names["loss"] < 2  # ten classes: 2.3 by chance
    scores = names["recorder"].compute()
    assert len(scores) == 4
    assert all(score > 0 for score in scores)
    assert not any(point._forward_hooks for point in names["model"].hook_points)


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
    trainer, vit = names["trainer"], names["trainer"].model
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first["eval_loss"] < 2.28
    assert [first[f"eval_tokens/block_{index:02d}"] for index in range(4)] == [16, 12, 9, 9]
    assert first["eval_flops/reduction"] > 0.2
    recorder = names["tdm"].metrics.DiversityRecorder(vit)
    batch = torch.stack([item["pixel_values"] for item in names["data"][:8]])
    with recorder, torch.no_grad():
        vit.eval()(pixel_values=batch)
    again = trainer.predict(names["data"][:8])
    assert again.predictions.shape == (8, 10)
    callback = names["TokenReductionCallback"](max_batches=1)
    assert callback.max_batches == 1
    metrics = trainer.evaluate(names["data"][:8])
    for index, score in enumerate(recorder.compute()):
        assert metrics[f"eval_diversity/block_{index:02d}"] == pytest.approx(score.item(), rel=1e-4)


# One file, no edit elsewhere: through fit, test and export by name ----------------------------

BRIEF = ["--trainer.max_steps=1", "--trainer.max_epochs=1", "--model.warmup_epochs=0"]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
KEEP = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=kept"]
KEEP += ["--trainer.callbacks.every_n_train_steps=1"]


@pytest.mark.parametrize(
    ("module", "model", "strategy", "kind"),
    [
        ("strategy_of_your_own", [], ["strategy=strategy_of_your_own.LargestNorm"], "LargestNorm"),
        (
            "merger_of_your_own",
            [],
            ["strategy=EViT", "strategy.merger=merger_of_your_own.Neighbours"],
            "EViT",
        ),
        (
            "vit_of_your_own",
            ["model=encoder_vit_tiny", 'model_kwargs={"img_size": 8, "patch_size": 2}'],
            ["strategy=TDM", "strategy.layers=[1,3]"],
            "TDM",
        ),
    ],
)
def test_a_new_strategy_merger_and_model_go_through_the_commands(
    module, model, strategy, kind, monkeypatch
):
    monkeypatch.syspath_prepend(str(FOLDER))
    importlib.import_module(module)
    given = [f"--model.{setting}" for setting in (*model, *strategy)]
    common = ["--config=quickstart", *QUIET, *given]
    cli = main(["fit", *common, *BRIEF, *KEEP, "--trainer.callbacks.filename=best"])
    assert type(cli.model.model.strategy).__name__ == kind
    checkpoint = "kept/best.ckpt"
    arguments = ["--trainer.limit_test_batches=1", "--trainer.callbacks=null"]
    tested = main(["test", *common, *arguments, f"--ckpt_path={checkpoint}"])
    assert type(tested.model.model.strategy).__name__ == kind
    again = [f"--{setting}" for setting in strategy]
    written = main(["export", f"--weights={checkpoint}", *again, "--format=pt2", "--out=own.pt2"])
    assert written.exists()
