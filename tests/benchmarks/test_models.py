"""``python -m benchmarks.models``: its trials see what is wrong, and the table says so."""

import pytest
import torch
from torch import nn

from benchmarks.models.__main__ import models
from benchmarks.models.table import markdown
from benchmarks.models.tiny import tiny
from benchmarks.models.trials import TRIALS, outcome
from benchmarks.runner import run
from tdm_lightning.cli.models import library_of
from tdm_lightning.errors import SettingError
from tdm_lightning.vit.adapters import class_names

VIT = "timm.models.vision_transformer.VisionTransformer"


@pytest.mark.parametrize("path", [path for path in class_names() if library_of(path)])
def test_a_tiny_model_of_every_class(path):
    pytest.importorskip(path.partition(".")[0])
    vit = tiny(path)
    assert path in {f"{kind.__module__}.{kind.__qualname__}" for kind in type(vit).__mro__}
    assert sum(weight.numel() for weight in vit.parameters()) < 300_000
    assert outcome(TRIALS["forward"], vit) == outcome(TRIALS["trace"], vit) == "yes"


class Stubborn(nn.Module):
    """An attention's norm that changes with what it is asked."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_the_trials_see_what_is_wrong():
    vit = tiny(VIT)
    vit.blocks[2].norm1 = Stubborn()
    assert "not close" in outcome(TRIALS["forward"], vit)
    vit = tiny(VIT)
    nn.init.constant_(vit.blocks[0].mlp.fc1.weight, torch.inf)
    assert "not finite" in outcome(TRIALS["half"], vit)
    vit = tiny(VIT)
    nn.init.constant_(vit.head.weight, torch.inf)
    assert outcome(TRIALS["train"], vit).startswith("AssertionError")


def test_the_table():
    found = {VIT: {"forward": "yes", "onnx": "RuntimeError: why"}}
    page = markdown(found)
    assert "| timm | `VisionTransformer` | yes | no |" in page
    assert "- `VisionTransformer`, onnx: RuntimeError: why" in page
    assert "- `SwinTransformer`: its attention runs in windows" in page
    assert all(len(line) <= 100 for line in page.splitlines())


def test_an_unknown_trial():
    with pytest.raises(SettingError, match="trials"):
        run(models, ["--trials", "[fly]"])
