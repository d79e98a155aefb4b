"""Every shipped configuration goes through fit, test and predict under a tiny layer."""

import pytest
import timm
import torch
import yaml

from tdm_lightning.cli import config_folder, main, named_configs

STRATEGIES = [name for name in named_configs() if name.startswith("strategies/")]
RECIPES = [name for name in named_configs() if name.startswith("recipes/")]
MODELS = [name for name in named_configs() if name.startswith("deit_")]

#: Twelve blocks of width 32 on digits, in seconds. Names of the real layers stay, their sizes
#: shrink.
TINY = {
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "fast_dev_run": 1,
        "enable_progress_bar": False,
    },
    "model": {
        "model_kwargs": {
            "img_size": 16,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 32,
            "num_heads": 2,
        },
        "weights": None,
        "warmup_epochs": 0,
    },
    "data": {"dataset": "digits", "batch_size": 4, "num_workers": 0},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def run(tiny, *layers, commands=("fit", "test", "predict"), last=()):
    for command in commands:
        arguments = [part for layer in (*layers, tiny, *last) for part in ("--config", layer)]
        yield main([command, *arguments])


#: Methods whose keep rate is annealed, those trained as DeiT is, and those that need a trained
#: model to learn from.
SCRATCH = ("tdm", "ward", "evit", "evit_tdm")
DEIT = ("plain", "evovit", "evovit_tdm", "tome", "topk", "random", "dpcknn")
DYVIT = ("dyvit", "dyvit_tdm")
PEERS = ("pitome", "tofu", "mctf", "diffrate", "mpm", "mame")
FINETUNED = (*SCRATCH, "plain", "tome", "topk", "random", "dpcknn", *PEERS)
PAIRS = [
    (f"strategies/{name}", f"recipes/{recipe}")
    for recipe, names in {
        "scratch": SCRATCH,
        "deit": DEIT,
        "dyvit": DYVIT,
        "finetune": FINETUNED,
    }.items()
    for name in names
]
PAIRS += [
    ("strategies/avit", "recipes/avit"),
    ("strategies/iared2", "recipes/iared2"),
    ("strategies/psvit", "recipes/psvit"),
    ("strategies/spvit", "recipes/spvit"),
    ("strategies/spvit_tdm", "recipes/spvit"),
    ("strategies/svite", "recipes/svite"),
    ("strategies/svite_tdm", "recipes/svite"),
]


def test_every_strategy_and_recipe_is_tried():
    assert {strategy for strategy, _ in PAIRS} == set(STRATEGIES)
    assert {recipe for _, recipe in PAIRS} == set(RECIPES)


@pytest.mark.parametrize(("strategy", "recipe"), PAIRS)
def test_every_strategy_with_its_recipes(tiny, tmp_path, strategy, recipe):
    if recipe in ("recipes/dyvit", "recipes/spvit"):  # they learn from the model they start from
        vit = timm.create_model(
            "deit_tiny_patch16_224", num_classes=10, **TINY["model"]["model_kwargs"]
        )
        start = tmp_path / "start.yaml"
        torch.save({"model": vit.state_dict()}, tmp_path / "start.pth")
        start.write_text(yaml.safe_dump({"model": {"weights": str(tmp_path / "start.pth")}}))
        last = (str(start),)
    else:
        last = ()
    (cli,) = run(tiny, "deit_tiny", strategy, recipe, commands=["fit"], last=last)
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("model", MODELS)
def test_every_model_through_every_command(tiny, model):
    for cli in run(tiny, model, "strategies/tdm", "recipes/finetune"):
        assert cli.trainer.state.finished


def test_quickstart_through_every_command(tiny):
    for cli in run(tiny, "quickstart"):
        assert cli.trainer.state.finished


@pytest.mark.parametrize("name", named_configs())
def test_strategy_files_state_every_argument(name):
    """A later layer of the same class would otherwise keep what an earlier one said."""
    layer = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())
    strategy = (layer.get("model") or {}).get("strategy")
    if not name.startswith("strategies/") or strategy is None:
        return
    import tdm_lightning

    cls = getattr(tdm_lightning, strategy["class_path"].rsplit(".", 1)[-1])
    assert set(strategy["init_args"]) == set(cls().config()["init_args"])


def test_full_size_model_takes_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = tmp_path / "local.yaml"
    layer.write_text(
        yaml.safe_dump(
            {
                "trainer": {**TINY["trainer"], "callbacks": None, "limit_val_batches": 0},
                "model": {"weights": None, "model_kwargs": {"in_chans": 1}, "warmup_epochs": 0},
                "data": {**TINY["data"], "batch_size": 2},
            }
        )
    )
    cli = main(
        [
            "fit",
            "--config",
            "deit_small",
            "--config",
            "strategies/tdm",
            "--config",
            "recipes/finetune",
            "--config",
            str(layer),
        ]
    )
    assert cli.model.model.vit.embed_dim == 384
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
