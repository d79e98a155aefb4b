"""The example programs run as they stand and print sensible figures."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from tdm_lightning.cli import main

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["example"])
    torch.manual_seed(0)
    with torch.enable_grad():  # some turn it off
        yield


def test_there_is_none_without_a_test():
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        "bulk_inference",
        "dense",
        "fabric",
        "huggingface",
        "merger_of_your_own",
        "strategy_of_your_own",
        "plain_loop",
        "retrieval",
        "vision_language",
        "vit_of_your_own",
        "zero_shot",
    }


@pytest.mark.parametrize("name", ["plain_loop", "fabric"])
def test_loops(name):
    names = runpy.run_path(str(FOLDER / f"{name}.py"))
    assert names["loss"] < 2  # ten classes: 2.3 by chance
    scores = names["recorder"].compute()
    assert len(scores) == 4
    assert all(score > 0 for score in scores)
    assert not any(point._forward_hooks for point in names["model"].hook_points)


# With models of real width and untrained weights: they agree with the unreduced model ----------


def share(found, wanted):
    return (found == wanted).float().mean()


def test_zero_shot_classification_at_real_width():
    names = runpy.run_path(str(FOLDER / "zero_shot.py"))
    assert share(names["chosen"], names["label"]) > 0.7  # six photographs: 0.17 by chance
    assert share(names["again"], names["chosen"]) > 0.9
    assert not torch.equal(names["after"], names["before"])
    vit = names["clip"].visual
    assert vit.trace(names["images"][:1])[1].token_counts[::3] == [138, 97, 68, 48]
    assert type(names["plain"].visual) is type(vit.vit)


def test_a_language_model_that_reads_merged_tokens_at_real_width(monkeypatch):
    names = runpy.run_path(str(FOLDER / "vision_language.py"))
    before, (unmerged, merged), photo = names["before"], names["ways"], names["photo"]
    assert names["words"].shape == (1, 1 + 576 + 2 + 4)
    vit = names["tdm"].find_vit(names["llava"])
    tokens, size = vit.forward_merged(photo, -2)
    assert tokens.shape == (1, 140, 384)
    assert size.sum() == 576

    def alike(read):
        return torch.cosine_similarity(read(photo), before(photo)).item()

    assert 0.99 < alike(unmerged) < 0.99999
    assert 0.98 < alike(merged) < 0.99999
    monkeypatch.setattr(vit, "forward_merged", lambda *_: (tokens, torch.ones_like(size)))
    assert alike(merged) < 0.9  # sizes are what it takes


def test_dense_heads_at_real_width():
    names = runpy.run_path(str(FOLDER / "dense.py"))
    assert names["features"].shape == names["dense"].shape == (576, 384)
    assert torch.corrcoef(torch.stack((names["depth"], names["again"])))[0, 1] > 0.9
    assert share(names["mask"], names["truth"]) > 0.95
    assert share(names["same"], names["mask"]) > 0.95
    assert not torch.equal(names["dense"], names["features"])


def test_retrieval_at_real_width():
    names = runpy.run_path(str(FOLDER / "retrieval.py"))
    before, after, photo = names["before"], names["after"], names["photo"]
    assert before.shape == after.shape == (24, 3)
    assert share(photo[before[:, 0]], photo) > 0.6  # of 23 others three are right: 0.13 by chance
    assert share(photo[after[:, 0]], photo) > 0.6
    assert names["same"] > 0.8
    counts = names["model"].trace(names["images"][:1])[1].token_counts
    assert counts[::3] == [205, 164, 132, 106]


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


@pytest.mark.slow
def test_bulk_inference(tmp_path):
    program = [sys.executable, str(FOLDER / "bulk_inference.py")]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    speed, agreement = (float(number) for number in re.findall(r"\d+\.\d+|\d+", done.stdout))
    assert speed > 0
    assert agreement > 0.995  # near ties, where batches of other sizes round otherwise
    rows = Dataset.from_parquet(str(tmp_path / "predictions.parquet"), cache_dir=str(tmp_path))
    assert len(rows) == 1797
    assert set(rows["rank"]) == {0, 1}
    assert set(rows["label"]) <= set(range(10))


def test_the_script_for_slurm(tmp_path, monkeypatch, capsys):
    script = FOLDER / "train.sbatch"
    assert script.read_text().startswith("#!/bin/bash\n")
    stub = tmp_path / "srun"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > given\n')
    stub.chmod(0o755)
    given = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "77"}
    environment = {**given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-n", script], check=True)
    more = ["--model.strategy.keep_rate", "0.5"]
    subprocess.run(["bash", script, *more], env=environment, check=True)
    tdm, *arguments = (tmp_path / "given").read_text().splitlines()
    assert tdm == "tdm"
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    trainer, processes = settings["trainer"], 2 * 8
    assert (trainer["num_nodes"], trainer["devices"]) == (2, "8")
    assert trainer["default_root_dir"] == "runs/tdm-77"
    assert settings["data"]["batch_size"] * processes == 1024
    assert settings["model"]["strategy"]["init_args"]["keep_rate"] == 0.5


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
