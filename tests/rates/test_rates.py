"""Learned counts: the budget, the gain, what cannot be met, and ``tdm rates``."""

import pytest
import timm
import torch
import yaml
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.cli import main
from tdm_lightning.rates import distortion, learn_counts
from tests.helpers.vits import lively

SHAPE = {
    "img_size": 16,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}
NAME = "deit_tiny_patch16_224"


def trained():
    """Its answers differ from image to image."""
    torch.manual_seed(0)
    vit = lively(timm.create_model(NAME, **SHAPE).eval())
    torch.nn.init.normal_(vit.head.weight)
    return vit


@pytest.fixture(scope="module")
def vit():
    return trained()


BLOCKS = (0, 1, 2)
DIGITS = ("--data=ImageNetDataModule", "--data.dataset=digits", "--data.batch_size=16")


def method(merger):
    return tdm.TokenReduction(tdm.ClassAttention(), None, merger)


@pytest.mark.parametrize("merger", [tdm.WardMerger(), tdm.RankMerger()], ids=["ward", "rank"])
def test_counts_meet_the_budget_and_lose_less_than_a_constant_rate(vit, merger):
    images = [torch.randn(8, 1, 16, 16), torch.randn(4, 1, 16, 16)]
    budget = 0.6 * tdm.flops.macs_with(vit, tdm.Strategy()) / 1e9
    found = learn_counts(vit, method(merger), images, budget, BLOCKS, sweeps=1)
    assert 0.95 * budget <= found.gmacs <= budget
    assert tdm.flops.macs_with(vit, found.strategy, total=True) == found.gmacs * 1e9
    assert found.counts == list(found.strategy.schedule.counts)
    assert found.loss < found.start
    assert found.tried >= 3
    model = tdm.attach(vit, found.strategy)
    with torch.no_grad():
        distances = [distortion(vit(batch), model(batch)) for batch in images]
    assert torch.cat(distances).double().mean().item() == pytest.approx(found.loss, abs=1e-6)


def test_only_the_given_blocks_reduce(vit):
    budget = 0.7 * tdm.flops.macs_with(vit, tdm.Strategy()) / 1e9
    images = [torch.randn(4, 1, 16, 16)]
    found, again = (
        learn_counts(vit, method(tdm.WardMerger()), images, budget, layers=(1,), sweeps=1)
        for _ in range(2)
    )
    assert found.counts == again.counts
    assert found.counts[0] == 64
    assert found.counts[1] == found.counts[3] < 64


def test_a_budget_out_of_reach_says_what_is_within(vit):
    plain = tdm.flops.macs_with(vit, tdm.Strategy()) / 1e9
    with pytest.raises(ValueError, match=r"cannot be met: .* it can be from 0\.\d+ to 0\.\d+;"):
        learn_counts(vit, method(tdm.WardMerger(1)), [torch.randn(2, 1, 16, 16)], plain / 9)


def test_distortion_is_a_divergence():
    plain, other = torch.randn(3, 5), torch.randn(3, 5)
    expected = F.kl_div(
        other.log_softmax(1), plain.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    torch.testing.assert_close(distortion(plain, other), expected)
    assert distortion(plain, 2 * plain, classifies=False).abs().max() < 1e-6


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit = trained()
    torch.save({"model": vit.state_dict()}, "vit.pth")
    budget = 0.7 * tdm.flops.macs_with(vit, tdm.Strategy()) / 1e9
    shape = [f"--model={NAME}", f"--model_kwargs={yaml.safe_dump(SHAPE, default_flow_style=True)}"]
    found = main(
        [
            "rates",
            f"--match_gmacs={budget}",
            "--weights=vit.pth",
            *shape,
            *DIGITS,
            "--layers=[1]",
            "--data.num_workers=0",
            "--images=32",
            "--sweeps=1",
            "--out=learned/rates.yaml",
        ]
    )
    written = yaml.safe_load((tmp_path / "learned/rates.yaml").read_text())
    strategy = tdm.Strategy.from_config(written["model"]["strategy"])
    assert strategy.config() == found.strategy.config()
    fit = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--config=learned/rates.yaml"]
    fit += ["--model.warmup_epochs=0"]
    run = main(["fit", "--config=quickstart", *fit, f"--model.model_kwargs={SHAPE}"])
    assert list(run.model.model.strategy.schedule.counts) == found.counts


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--match_gmacs"),
        (["--match_gmacs=1"], "--data"),
        (
            ["--match_gmacs=1", "--data=ImageNetDataModule", "--data.dataset=digits"],
            "untrained model's answers",
        ),
    ],
)
def test_what_is_missing_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        main(["rates", *given])
