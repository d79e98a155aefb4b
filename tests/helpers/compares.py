"""``tdm compare`` of small models, and what it wrote."""

import csv
import json

import pytest
import timm

import tdm_lightning as tdm
from tdm_lightning.cli import main
from tdm_lightning.compare import timing

SHAPE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}
NAME = "deit_tiny_patch16_224"
STRATEGIES = [
    {"class_path": "TDM", "init_args": {"keep_rate": 0.5, "layers": [1]}},
    {"class_path": "EvoViT", "init_args": {"layers": [2]}},
    {"class_path": "ToMe", "init_args": {"r": 2}},
]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """``tdm compare`` of small models, timed as briefly as can be."""
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)

    def call(*extra, strategies=STRATEGIES, shape=SHAPE, rounds=2):
        out = tmp_path / "out"
        arguments = [
            f"--model={NAME}",
            f"--model_kwargs={json.dumps(shape)}",
            f"--strategies={json.dumps(strategies)}",
        ]
        arguments += [
            f"--rounds={rounds}",
            "--warmup=1",
            "--batch_sizes=2",
            "--device=cpu",
            f"--out={out}",
        ]
        main(["compare", *arguments, *extra])

    return call


def lines(tmp_path):
    with (tmp_path / "out/compare.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(tmp_path):
    """By method, where there is one batch size."""
    return {row["method"]: row for row in lines(tmp_path)}


def reduced(strategy, shape=SHAPE):
    return tdm.attach(timm.create_model(NAME, **shape), strategy)


class Positive(tdm.Strategy):
    """Each image keeps its patches with a positive first channel."""

    adaptive = True

    def before_block(self, index, tokens):
        return tokens.packed(index, tokens.patches[..., 0] > 0) if index == 1 else tokens
