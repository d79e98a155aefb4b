"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block(word):
    (found,) = [text for text in BLOCKS if word in text]
    return found


@pytest.fixture
def untrained(monkeypatch):
    """The same model without its pretrained weights, which need a download."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs)
    )


def test_five_lines_and_what_follows(untrained):
    names = {"images": torch.zeros(1, 3, 224, 224)}
    exec(block("logits = model(torch.randn"), names)
    exec(block("logits, trace"), names)
    assert names["logits"].shape == (1, 1000)
    assert names["trace"].token_counts[-1] == 68
    assert tdm.flops.count_macs(names["model"]) == 2996994816
    assert tdm.flops.count_macs(names["stacked"]) == 2996994816


def test_subclass():
    names = {"__name__": "readme"}
    exec(block("class FocalClassifier"), names)
    module = names["FocalClassifier"](
        gamma=1.0, model="test_vit", num_classes=4, mixup=0.0, cutmix=0.0
    )
    criterion = module.configure_criterion()
    logits, target = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    plain = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(criterion(logits, target), (1 - (-plain).exp()) * plain)
    assert module.hparams.gamma == 1.0


def test_own_strategy():
    code = block("class Norm")
    assert len(code[code.index("class Norm") :].strip().splitlines()) <= 20
    names = {"__name__": "readme"}
    exec(code, names)
    vit = timm.create_model("test_vit", img_size=96).eval()
    model = tdm.attach(vit, names["Norm"](keep_rate=0.5, layer=2))
    logits, trace = model.trace(torch.randn(2, 3, 96, 96))
    assert trace.token_counts == [36, 36, 18, 18, 18, 18]
    assert (trace.layers[0].assignment >= 0).sum(1).tolist() == [18, 18]
    assert torch.isfinite(logits).all()
    plain = tdm.attach(vit, names["Norm"](keep_rate=1.0))
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(plain(images), vit(images))


def test_callbacks_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = tdm.attach(
                timm.create_model("test_vit", img_size=96, num_classes=3), tdm.TDM(0.5, (1, 3))
            )

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    code = block("trainer.fit(your_module")
    settings = (
        "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,"
        " enable_progress_bar=False,"
    )
    loader = DataLoader(
        TensorDataset(torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 0])), batch_size=2
    )
    exec(
        code.replace("max_epochs=300,", settings), {"your_module": Foreign(), "your_loader": loader}
    )


@pytest.fixture
def reduced():
    torch.manual_seed(0)
    return tdm.attach(
        timm.create_model("test_vit", img_size=96, num_classes=3), tdm.TDM(0.5, (1, 3))
    )


def test_a_loop_of_ones_own(reduced, capsys):
    loader = DataLoader(
        TensorDataset(torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 0])), batch_size=2
    )
    exec(block("DiversityRecorder(model)"), {"model": reduced, "loader": loader})
    printed = capsys.readouterr().out
    scores = eval(printed[: printed.index("]") + 1])
    assert len(scores) == 6
    assert all(score > 0 for score in scores)
    assert float(printed[printed.index("]") + 1 :]) * 1e9 == pytest.approx(
        tdm.flops.count_macs(reduced)
    )
    assert not any(tap._forward_hooks for tap in reduced.hook_points)


def test_sharing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tdm.attach(timm.create_model("test_vit"), tdm.TDM(0.5, (1, 3))).eval()
    names = {"model": model, "tdm": tdm}
    exec(block("save_pretrained"), names)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(names["same"].eval()(images), model(images))


def test_at_most_300_lines():
    assert len(README.splitlines()) <= 300
