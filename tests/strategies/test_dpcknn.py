"""DPC-KNN: against the official code, and its learned weights."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.ops import cluster_density_peaks


@pytest.mark.usefixtures("form")
@torch.no_grad()
def test_official_numbers(official):
    facts, tensors, model = official("dpcknn_a", tdm.DPCKNN(0.7, neighbours=5))
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features, tensors["features"], atol=2e-4, rtol=0)
    assert [count + 1 for count in output.trace.token_counts] == tensors["token_counts"].tolist()
    held = torch.arange(64).expand(3, -1)
    for layer, clusters in zip(output.trace.layers, facts["method"]["cluster_counts"], strict=True):
        held = tensors[f"assignment.{layer.index}"].gather(1, held)
        assert torch.equal(layer.assignment, held)
        assert held.unique().numel() == clusters
        assert (layer.role == Role.CLUSTERED).all()


@torch.no_grad()
def test_neighbours_change_the_official_case(official):
    _, tensors, model = official("dpcknn_a", tdm.DPCKNN(0.7, neighbours=2))
    assert (model(tensors["input"]) - tensors["logits"]).abs().amax(1).min() > 1e-3


def test_equal_tokens_give_the_same_clusters_every_time():
    x = torch.randn(1, 5, 4).repeat(
        3, 4, 1
    )  # four copies of every token, three times the same image
    label, centres = cluster_density_peaks(x, 7, density="knn")
    again = cluster_density_peaks(x, 7, density="knn")
    assert torch.equal(label, again[0])
    assert torch.equal(centres, again[1])
    assert (label == label[:1]).all()
    assert label[0].unique().tolist() == list(range(7))


def test_learned_weights_are_trained_and_start_no_overflow():
    model = tdm.attach(
        timm.create_model("test_vit", img_size=64),
        tdm.DPCKNN(0.7, layers=(1, 3), learned_weights=True),
    )
    plain = timm.create_model("test_vit", img_size=64)
    own = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert own == 2 * (plain.embed_dim + 1)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(scorer.weight.grad.abs().sum() > 0 for scorer in model.strategy.scorers)
    with torch.no_grad():
        for scorer in model.strategy.scorers:
            scorer.weight.mul_(1e5)
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def test_equal_scores_are_equal_weights():
    vit = timm.create_model("test_vit", img_size=64).eval()
    learned = tdm.attach(vit, tdm.DPCKNN(0.6, layers=(1, 3), learned_weights=True))
    for scorer in learned.strategy.scorers:
        scorer.weight.zero_()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        learned(images), tdm.attach(vit, tdm.DPCKNN(0.6, layers=(1, 3)))(images)
    )


def test_multiply_accumulates_and_parameters():
    vit = timm.create_model("deit_tiny_patch16_224")
    assert tdm.flops.count_macs(tdm.attach(vit, tdm.DPCKNN(0.7))) == 775_458_048
    model = tdm.attach(vit, tdm.DPCKNN(0.7, learned_weights=True))
    assert sum(p.numel() for p in model.parameters()) == 5_717_416 + 579
    assert tdm.flops.mac_report(model).learned == 192 * (196 + 137 + 96)


def test_a_strategy_with_weights_is_bound_once():
    strategy = tdm.DPCKNN(learned_weights=True)
    vit = timm.create_model("deit_tiny_patch16_224")
    tdm.attach(vit, strategy)
    with pytest.raises(ValueError, match="owns parameters"):
        tdm.attach(vit, strategy)


@pytest.mark.parametrize("neighbours", [0, -1])
def test_bad_neighbours(neighbours):
    with pytest.raises(ValueError, match="neighbours"):
        tdm.DPCKNN(neighbours=neighbours)
