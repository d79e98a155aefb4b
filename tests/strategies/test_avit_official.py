"""A-ViT: the official code, its files and the settings."""

import copy

import pytest
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.strategies.avit import prior_divergence, prior_target
from tests.helpers.avits import close

# The official code ----------------------------------------------------------------------------


@torch.no_grad()
def test_official_masking(official):
    facts, tensors, model = official("avit_a", tdm.AViT(gate_scale=10, gate_center=30))
    assert facts["method"]["halting_eps"] == model.strategy.eps
    accumulated = []
    model.vit.norm.register_forward_pre_hook(lambda norm, inputs: accumulated.append(inputs[0]))
    model.strategy.train()
    output = model.run(tensors["input"], trace=True)
    active = tensors["active"].bool()
    close(output.logits, tensors["logits"])
    close(output.features, tensors["features"], 2e-4)
    close(accumulated[0], tensors["accumulated"], 1e-3)
    scores = torch.stack(output.state.scores)
    close(scores, tensors["halting"] * active)
    assert torch.equal(output.state.blocks, tensors["counter"].float())
    close(output.state.ponder, tensors["rho"])
    close(output.state.ponder - output.state.blocks, tensors["remainder"])
    close((scores.cumsum(0) * active)[:-1], (tensors["cumulative"] * active)[:-1])
    counts = torch.stack(output.trace.token_counts)
    assert torch.equal(counts + active[:, :, 0], tensors["tokens_per_layer"])


@torch.no_grad()
def test_official_inference_with_halted_tokens_gone(official):
    _, tensors, model = official("avit_a", tdm.AViT(gate_scale=10, gate_center=30))
    output = model.run(tensors["input"], trace=True)
    close(output.logits, tensors["logits"])
    runs = tensors["active"][:, :, 0].long()  # an image is there as long as its class token
    assert torch.equal(
        torch.stack(output.trace.token_counts), (tensors["tokens_per_layer"] - 1) * runs
    )
    assert runs.sum(0).tolist() == [12, 12, 9]
    complete = tensors["counter"] <= runs.sum(0).unsqueeze(1)
    assert 0 < (~complete).sum() < 65
    close(output.features[complete], tensors["features"][complete], 2e-4)


def test_official_losses(golden):
    _, tensors = golden("avit_a")
    torch.testing.assert_close(
        prior_target(12, 8, 1), tensors["loss.prior_target"], atol=1e-6, rtol=1e-4
    )
    halting = tensors["halting"]
    close(
        halting[:, 1:].mean((1, 2)), tensors["halting_score_layer"], 1e-6
    )  # without the first image, as there
    torch.testing.assert_close(
        prior_divergence(halting[:, 1:], 8, 1), tensors["loss.prior_kl"], atol=0, rtol=1e-4
    )


@torch.no_grad()
def test_official_ponder_loss(official):
    _, tensors, model = official(
        "avit_a", tdm.AViT(gate_scale=10, gate_center=30, ponder_weight=1e-3)
    )
    model.strategy.train()
    terms = model.objective.loss(
        model.run(tensors["input"]), torch.tensor([0, 1, 2]), F.cross_entropy
    )
    torch.testing.assert_close(terms["ponder"], 1e-3 * tensors["loss.mean_rho"], atol=0, rtol=1e-4)
    torch.testing.assert_close(
        terms["task"],
        F.cross_entropy(tensors["logits"], torch.tensor([0, 1, 2])),
        atol=1e-4,
        rtol=0,
    )


@torch.no_grad()
@pytest.mark.parametrize("other", [{"gate_scale": 10.5}, {"gate_center": 32.0}, {"eps": 0.3}])
def test_settings_change_the_official_case(official, other):
    _, tensors, model = official(
        "avit_a", tdm.AViT(**{"gate_scale": 10, "gate_center": 30, **other})
    )
    assert (model(tensors["input"]) - tensors["logits"]).abs().max() > 1e-3


# Published files and settings -----------------------------------------------------------------


def test_published_files_load_and_name_their_gate(official, tmp_path):
    _, tensors, model = official("avit_a", tdm.AViT())
    weights = {key[11:]: value for key, value in tensors.items() if key.startswith("state_dict.")}
    path = tmp_path / "tiny-10-30.pth"
    torch.save({"model": weights, "epoch": 99}, path)
    fresh = tdm.attach(copy.deepcopy(model.vit), tdm.AViT.from_file_name(path, eps=0.02))
    torch.nn.init.zeros_(fresh.vit.head.weight)
    assert tdm.checkpoints.load_official(fresh, path).untouched == ()
    assert torch.equal(fresh.vit.head.weight, weights["head.weight"])
    strategy = tdm.AViT.from_file_name("weights/small-10-75.pth")
    assert (strategy.gate_scale, strategy.gate_center) == (10, 75)
    assert (fresh.strategy.gate_center, fresh.strategy.eps) == (30, 0.02)
    assert tdm.AViT.from_file_name("a-0.5-7.5").gate_scale == 0.5
    for name in ("small.pth", "small-75.pth", "small-10-75-best.pth"):
        with pytest.raises(ValueError, match="does not end in gate scale and center"):
            tdm.AViT.from_file_name(name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate_scale": 0}, ValueError, "gate_scale must be finite and above 0"),
        ({"gate_scale": "10"}, TypeError, "gate_scale must be a number"),
        ({"gate_center": float("nan")}, ValueError, "gate_center must be finite"),
        ({"gate_center": float("-inf")}, ValueError, "gate_center must be finite"),
        ({"gate_center": True}, TypeError, "gate_center must be a number"),
        ({"eps": 0}, ValueError, "eps must be finite and above 0"),
        ({"eps": 1.0}, ValueError, r"eps must lie in \(0, 1\)"),
        ({"ponder_weight": -1}, ValueError, "ponder_weight must be finite and at least 0"),
        ({"prior_weight": float("inf")}, ValueError, "prior_weight must be finite"),
        ({"prior_mean": 0}, ValueError, "prior_mean must be finite and above 0"),
        ({"prior_std": 0.0}, ValueError, "prior_std must be finite and above 0"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.AViT(**arguments)


def test_config_round_trip():
    strategy = tdm.AViT(5, 12.5, prior_mean=4)
    again = tdm.AViT.from_config(strategy.config())
    assert again.config() == strategy.config()
    assert again.gate_center == 12.5
