"""SPViT: training, and what its merger does."""

import copy
import functools

import pytest
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import Output, Role
from tdm_lightning.ops import policy_softmax
from tdm_lightning.strategies.spvit import PackageState
from tests.helpers.spvits import small, without_noise
from tests.helpers.vits import grouped

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# Training -------------------------------------------------------------------------------------


@torch.no_grad()
def test_training_computes_what_inference_does(images, monkeypatch):
    """Without noise and ε, pooling over patches included."""
    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    monkeypatch.setattr(
        "tdm_lightning.vit.adapters.attention.policy_softmax",
        functools.partial(policy_softmax, eps=0),
    )
    for vit in ({}, {"global_pool": "avg"}, {"global_pool": "avgmax", "class_token": False}):
        model = small(vit)
        expected, trace = model.trace(images)
        model.strategy.train()
        output = model.run(images, trace=True)
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-3)
        for mine, theirs in zip(output.trace.layers, trace.layers, strict=True):
            assert torch.equal(mine.role, theirs.role)
        assert output.features.shape[1] == model.num_prefix_tokens + 16 + 2


def test_a_dropped_patch_never_returns(images):
    output = small(std=0.2).train().run(images)
    first, second = output.state.decisions
    assert first.shape == second.shape == (4, 16)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (second <= first).all()
    assert second.sum() < first.sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"package": "mean"},
        {"shared_heads": False},
        {"fixed_count": True, "merger": tdm.TokenMerger()},
        {"fixed_count": True, "merger": tdm.TokenMerger(proportional_attention=True)},
    ],
    ids=str,
)
def test_the_task_alone_reaches_selectors_and_backbone(images, kwargs, checkpointing):
    model = small(std=0.2, **kwargs).train()
    model.set_grad_checkpointing(checkpointing)
    F.cross_entropy(model(images), LABELS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_autocast_trains_with_finite_gradients(images):
    model = small(std=0.2).train()
    teacher = tdm.attach(model.vit, tdm.Strategy()).run(images)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.objective.loss(model.run(images), LABELS, F.cross_entropy, teacher)
    sum(terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_losses_by_hand(images):
    model = small(std=0.2).train()
    output, teacher = (
        model.run(images),
        tdm.attach(copy.deepcopy(model.vit), tdm.Strategy()).eval().run(images),
    )
    terms = model.objective.loss(output, LABELS, F.cross_entropy, teacher)
    first, second = output.state.decisions
    ratio = ((first.mean() - 0.6) ** 2 + (second.mean() - 0.3) ** 2) / 2
    kl = F.kl_div(
        output.logits.log_softmax(1),
        teacher.logits.log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    left = second.bool()  # class token, dropped patches and packages have no part
    tokens = F.mse_loss(output.features[:, 1:17][left], teacher.features[:, 1:][left])
    expected = {
        "task": F.cross_entropy(output.logits, LABELS),
        "ratio": 2 * ratio,
        "distillation": kl / 2,
        "tokens": tokens / 2,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    alone = small(distill_weight=0, token_weight=0, ratio_weight=1)
    assert not alone.strategy.requires().teacher
    torch.testing.assert_close(alone.strategy.loss(output, LABELS, F.cross_entropy)["ratio"], ratio)


def test_only_the_batch_is_held_to_the_targets():
    decision = torch.zeros(2, 10)
    decision[0] = 1  # one image keeps all, the other none
    output = Output(torch.zeros(2, 5), torch.zeros(2, 11, 8), None, PackageState(10, (decision,)))
    strategy = tdm.SPViT(layers=(1,), targets=(0.5,), distill_weight=0, token_weight=0)
    assert strategy.loss(output, LABELS[:2], F.cross_entropy)["ratio"] == 0


def test_losses_ask_for_what_they_need(images):
    model = small().train()
    output = model.run(images)
    with pytest.raises(
        ValueError, match="SPViT distils from the unreduced model: pass its output as teacher"
    ):
        model.objective.loss(output, LABELS, F.cross_entropy)
    with pytest.raises(
        ValueError, match=r"SPViT's predictors only learn in training mode: call model.train\(\)"
    ):
        model.objective.loss(model.eval().run(images), LABELS, F.cross_entropy)


def test_the_ratio_loss_moves_the_kept_share_to_the_targets():
    torch.manual_seed(1)
    model = small(std=0.2, ratio_weight=10.0, distill_weight=0, token_weight=0).train()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.strategy.parameters(), lr=1e-2)
    history = []
    for _ in range(80):
        output = model.run(images)
        history.append([decision.mean().item() for decision in output.state.decisions])
        optimizer.zero_grad()
        sum(model.objective.loss(output, labels, F.cross_entropy).values()).backward()
        optimizer.step()
    late = torch.tensor(history[-15:]).mean(0)
    assert late.tolist() == pytest.approx([0.6, 0.3], abs=0.06)
    assert max(abs(history[0][0] - 0.6), abs(history[0][1] - 0.3)) > 0.06


def test_optimizer_groups():
    model = small()
    groups, found = grouped(model)
    assert {name for name, _ in model.named_parameters()} - set(found) == {
        "vit.pos_embed",
        "vit.cls_token",
    }
    for name, group in found.items():
        own, decays = name.startswith("strategy."), model.get_parameter(name).ndim > 1
        assert group["lr"] == pytest.approx(1e-3 if own else 1e-5)
        assert group.get("freeze_epochs", 0) == (0 if own else 5)
        assert group["weight_decay"] == (0.05 if decays else 0.0)
    torch.optim.AdamW(groups)
    from_scratch = small(backbone_lr_scale=None)
    assert from_scratch.strategy.param_groups(from_scratch, lr=1e-3, weight_decay=0.05) is None


# The merger -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_merger_keeps_the_counts_and_the_attentive_patches(images):
    packing, model = small(fixed_count=True), small(fixed_count=True, merger=tdm.TokenMerger())
    (logits, merged), (others, packed) = model.trace(images), packing.trace(images)
    assert merged.token_counts == [16, 9, 9, 4, 4, 4]
    assert torch.equal(merged.layers[0].importance, packed.layers[0].importance)
    assert torch.equal(
        merged.layers[0].role == Role.CLUSTERED, packed.layers[0].role == Role.CLUSTERED
    )
    assert (merged.layers[0].assignment >= 0).all()
    assert (logits - others).abs().amax(1).min() > 1e-4


def test_training_with_the_merger_merges_for_real(images):
    model = small(fixed_count=True, merger=tdm.TokenMerger(), std=0.2).train()
    output = model.run(images)
    assert output.features.shape[1] == 1 + 4
    assert output.state.holder.shape == (4, 16)
    teacher = tdm.attach(copy.deepcopy(model.vit), tdm.Strategy()).eval().run(images)
    terms = model.objective.loss(output, LABELS, F.cross_entropy, teacher)
    held = F.one_hot(output.state.holder, 4).float()
    mean = held.transpose(1, 2) @ teacher.features[:, 1:] / held.sum(1).unsqueeze(-1)
    torch.testing.assert_close(terms["tokens"], 0.5 * F.mse_loss(output.features[:, 1:], mean))
    shares = torch.stack([decision.sum(1).mean() / 16 for decision in output.state.decisions])
    torch.testing.assert_close(
        terms["ratio"], 2 * ((shares - torch.tensor([0.6, 0.3])) ** 2).mean()
    )
