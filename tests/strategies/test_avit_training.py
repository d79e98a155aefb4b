"""A-ViT: its loss and what it teaches."""

import pytest
import torch
from torch.nn import functional as F

from tdm_lightning.strategies.avit import prior_divergence, prior_target
from tests.helpers.avits import close, masking, small


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# Training -------------------------------------------------------------------------------------


def test_the_loss_has_its_terms(images):
    model = small(ponder_weight=0.5, prior_weight=2.0, prior_mean=3.0, prior_std=1.5).train()
    output = model.run(images)
    target = torch.tensor([0, 1, 2, 3])
    terms = model.objective.loss(output, target, F.cross_entropy)
    assert list(terms) == ["task", "ponder", "prior"]
    close(terms["task"], F.cross_entropy(output.logits, target))
    close(terms["ponder"], 0.5 * output.state.ponder.mean())
    density = torch.distributions.Normal(3.0, 1.5).log_prob(torch.arange(6.0)).exp()
    wanted = density * 0.98 / density[:3].sum()
    share = torch.stack(output.state.scores).mean((1, 2))
    share = (share / share.sum()).clamp(0.01, 0.99)
    close(terms["prior"], 2 * torch.nn.KLDivLoss(reduction="batchmean")(share.log(), wanted), 1e-5)
    assert terms["prior"] > 0
    close(model.objective.report(output, target)["blocks"], output.state.blocks.mean())
    model.eval()
    assert list(model.objective.loss(model.run(images), target, F.cross_entropy)) == ["task"]


def test_a_negative_divergence_asks_for_nothing():
    target = prior_target(3, 8, 3.0)  # all blocks before the mean
    assert target.sum() == pytest.approx(0.98)
    share = target / target.sum()
    assert (target * (target / share).log()).sum() < 0
    assert prior_divergence(share.view(3, 1, 1), 8, 3.0) == 0
    assert prior_divergence(share.flip(0).view(3, 1, 1), 8, 3.0) > 0


def test_weights_of_a_token_sum_to_one(images):
    output = masking(small()).run(images)
    scores, blocks = torch.stack(output.state.scores), output.state.blocks
    before_halting = torch.arange(6).view(6, 1, 1) < blocks - 1
    close((scores * before_halting).sum(0) + output.state.ponder - blocks, torch.ones(4, 17), 1e-6)
    assert blocks.unique().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("term", ["task", "ponder", "prior"])
def test_every_term_teaches_channel_0(images, term):
    model = small().train()
    terms = model.objective.loss(model.run(images), torch.tensor([0, 1, 2, 3]), F.cross_entropy)
    terms[term].backward()
    for block in model.vit.blocks[:4]:
        gradient = block.mlp.fc2.weight.grad
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() > 0
    if term == "ponder":  # the last block's scores decide nothing
        assert model.vit.blocks[5].mlp.fc2.weight.grad is None


@pytest.mark.parametrize("center", [2.5, -100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_finite(images, center, dtype):
    """Also where an image has no token left to attend to, and where all scores are 0."""
    model = small(gate_center=center).train()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = model.objective.loss(model.run(images), torch.tensor([0, 1, 2, 3]), F.cross_entropy)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.vit.patch_embed.proj.weight.grad.any()


def test_halted_tokens_get_no_gradient_from_later_blocks(images):
    model = small(gate_center=-100.0).train()
    model(images).sum().backward()
    assert model.vit.blocks[0].mlp.fc1.weight.grad.any()
    for block in model.vit.blocks[1:]:
        assert block.mlp.fc1.weight.grad is None or not block.mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_checkpointed_gradients_are_the_same(images, training):
    found = []
    for enable in (False, True):
        model = small()
        model.strategy.train(training)
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            close(again, plain, 1e-5)


def test_ponder_loss_shortens_the_run(images):
    model = small(ponder_weight=1.0, prior_weight=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    blocks = []
    for _ in range(12):
        output = model.run(images)
        blocks.append(model.objective.report(output, None)["blocks"].item())
        optimizer.zero_grad()
        model.objective.loss(output, torch.tensor([0, 1, 2, 3]), F.cross_entropy)[
            "ponder"
        ].backward()
        optimizer.step()
    assert blocks[-1] < blocks[0] - 0.5
