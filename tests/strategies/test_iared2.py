"""IA-RED² at inference: its decisions, published weights and bad input."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_official
from tdm_lightning.core import Role
from tdm_lightning.strategies.interpreter import MultiHeadInterpreter
from tests.helpers.iared2s import LABELS, small


def keep_all(model):
    for interpreter in model.strategy.interpreters:
        torch.nn.init.zeros_(interpreter.qk.weight)
        torch.nn.init.ones_(interpreter.qk.bias)
    return model


def keep_none(model, group=0):
    qk = keep_all(model).strategy.interpreters[group].qk
    torch.nn.init.constant_(qk.bias[: len(qk.bias) // 3], -1)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# Decisions ------------------------------------------------------------------------------------


def test_scores_against_their_definition():
    interpreter = MultiHeadInterpreter(24, 3)
    torch.nn.init.normal_(interpreter.qk.weight, std=0.3)
    torch.nn.init.normal_(interpreter.qk.bias)
    tokens = torch.randn(2, 6, 24) * 3
    found = interpreter(tokens[:, :1], tokens[:, 1:])
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (
        tokens.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    q, k, _ = interpreter.qk(normed).chunk(3, dim=-1)
    for image in range(2):
        for patch in range(5):
            heads = [slice(8 * h, 8 * h + 8) for h in range(3)]
            logits = [
                (q[image, 0, h] @ k[image, patch + 1, h] / math.sqrt(8)).item() for h in heads
            ]
            expected = sum(1 / (1 + math.exp(-logit)) for logit in logits) / 3
            assert found[image, patch].item() == pytest.approx(expected, abs=1e-5)


def masked_pass(model, images):
    """As the authors' tool infers: all tokens stay, dropped ones are zeroed and masked out of the
    attention.
    """
    vit, strategy = model.vit, model.strategy
    x = vit._pos_embed(vit.patch_embed(images))
    policy, kept = torch.ones(x.shape[:2]), []
    for index, block in enumerate(vit.blocks):
        if index % 2 == 0:
            x = x * policy.unsqueeze(-1)
            interpreter = strategy.interpreters[index // 2]
            q, k, _ = (
                interpreter.qk(F.layer_norm(x, x.shape[-1:]))
                .unflatten(-1, (3, interpreter.heads, -1))
                .unbind(2)
            )
            logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) / math.sqrt(q.shape[-1])
            policy = (logits.sigmoid().mean(1) * policy > strategy.threshold).float()
            policy[:, 0] = 1
            x = x * policy.unsqueeze(-1)
            kept.append(policy[:, 1:].bool())
        q, k, v = (
            block.attn.qkv(block.norm1(x))
            .unflatten(-1, (3, block.attn.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        both = (policy.unsqueeze(1) * policy.unsqueeze(2)).bool().unsqueeze(1)
        weights = (
            (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
            .masked_fill(~both, -torch.inf)
            .softmax(-1)
            .nan_to_num()
        )
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return vit.head(vit.norm(x)[:, 0]), kept


@pytest.mark.parametrize("arguments", [{}, {"threshold": 0.6}, {"heads": 4}])
@torch.no_grad()
def test_removal_gives_what_masking_gives(images, arguments):
    model = small(tdm.IARED2(**arguments)).eval()
    logits, trace = model.trace(images)
    expected, kept = masked_pass(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert [layer.index for layer in trace.layers] == [0, 2, 4]
    for layer, stays in zip(trace.layers, kept, strict=True):
        assert torch.equal(layer.assignment >= 0, stays)
        assert torch.equal(layer.role == Role.KEPT, stays)
        assert torch.equal(trace.token_counts[layer.index], stays.sum(1))
    counts = torch.stack(trace.token_counts)
    assert (counts.diff(dim=0) <= 0).all()
    assert 0 < counts[-1].float().mean() < counts[0].float().mean() < 16
    assert len(set(counts[-1].tolist())) > 1


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images):
    model = small().eval()
    together, trace = model.trace(images)
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])


@torch.no_grad()
def test_scores_above_the_threshold_give_the_plain_model(images):
    model = keep_all(small()).eval()
    torch.testing.assert_close(model(images), model.vit(images), atol=1e-6, rtol=1e-6)
    never = small(tdm.IARED2(threshold=0.0)).eval()
    torch.testing.assert_close(never(images), never.vit(images), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_training_starts_from_the_plain_model(images):
    vit = timm.create_model("test_vit", img_size=64).eval()
    model = tdm.attach(vit, tdm.IARED2())
    pictures = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(pictures), vit(pictures), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_image_may_lose_all_of_its_patches(images, group, training, pool):
    model = keep_none(small(global_pool=pool), group).train(training)
    model.objective.on_progress(
        0 if group == 0 else 61, 0, 1
    )  # drawn while its own group learns, thresholded before
    with torch.no_grad():
        model.strategy.interpreters[group].qk.bias.mul_(10)
    output = model.run(images, trace=True)
    assert output.logits.isfinite().all()
    assert output.trace.token_counts[-1].tolist() == [0] * 4
    sum(
        model.objective.loss(
            output, LABELS, F.cross_entropy, model.strategy.second_pass(model, images)
        ).values()
    ).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_fewer_rows_enter_the_matmuls(images):
    """Multiply-accumulates as if each image had as many tokens as the longest, the first decision
    before any block.
    """
    model = small().eval()
    longest = [int(count.max()) + 1 for count in model.trace(images)[1].token_counts]
    assert longest[0] < 17
    report, width = tdm.flops.mac_report(model, images=images), 32
    for block, n in zip(report.blocks, longest, strict=True):
        assert block.attention == 4 * n * width**2 + 2 * n**2 * width
        assert block.mlp == 8 * n * width**2
        assert block.strategy == 0
    entering = [16, longest[1] - 1, longest[3] - 1]
    assert report.learned == sum(2 * width**2 + 2 * n * width for n in entering)


@pytest.mark.parametrize(
    ("name", "parameters"), [("tiny", 6_050_920), ("small", 23_381_224), ("base", 91_882_984)]
)
def test_parameters_of_the_published_weights(name, parameters):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224")
    model = tdm.attach(vit, tdm.IARED2())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [interpreter.heads for interpreter in model.strategy.interpreters] == [
        vit.blocks[0].attn.num_heads
    ] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite(images, dtype):
    model = small().eval()
    model.vit.pos_embed.mul_(30)
    logits = model.to(dtype)(images.to(dtype))
    assert logits.isfinite().all()
    assert logits.dtype == dtype


# Published weights ----------------------------------------------------------------------------


def published(model):
    """The model's weights as the authors' tool names them: blocks twice."""
    weights = {name: torch.randn_like(value) for name, value in model.vit.state_dict().items()}
    length = len(model.vit.blocks) // model.strategy.groups
    for name, value in list(weights.items()):
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            weights[f"groups.{int(block) // length}.block_list.{int(block) % length}.{rest}"] = (
                value.clone()
            )
    for group, interpreter in enumerate(model.strategy.interpreters):
        for kind, value in interpreter.qk.state_dict().items():
            weights[f"groups.{group}.agent.qk.{kind}"] = torch.randn_like(value)
    return weights


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_published_weights_load(groups):
    model = small(tdm.IARED2(groups))
    weights = published(model)
    report = load_official(model, weights)
    assert report == tdm.checkpoints.LoadReport("ia-red2")
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, weights[name])
    for group, interpreter in enumerate(model.strategy.interpreters):
        assert torch.equal(interpreter.qk.weight, weights[f"groups.{group}.agent.qk.weight"])
        assert torch.equal(interpreter.qk.bias, weights[f"groups.{group}.agent.qk.bias"])


def test_published_weights_that_do_not_fit():
    model = small()
    weights = published(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="groups.1.block_list.1.norm1.weight"):
        load_official(model, {**weights, "groups.1.block_list.1.norm1.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"Not in the model: strategy.interpreters.2"):
        load_official(small(tdm.IARED2(groups=2)), weights)
    with pytest.raises(ValueError, match="attach that method before loading"):
        load_official(model.vit, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 0}, ValueError, "groups"),
        ({"groups": 1.5}, TypeError, "groups"),
        ({"threshold": 1.0}, ValueError, "threshold"),
        ({"threshold": -0.1}, ValueError, "threshold"),
        ({"threshold": "half"}, TypeError, "threshold"),
        ({"heads": 0}, ValueError, "heads"),
        ({"penalty": []}, ValueError, "penalty"),
        ({"penalty": 3.0}, TypeError, "penalty"),
        ({"penalty": [3, float("nan")]}, ValueError, "penalty"),
        ({"interpreter_epochs": 0}, ValueError, "interpreter_epochs"),
        ({"block_epochs": 0}, ValueError, "block_epochs"),
        ({"interpreter_lr": -1e-3}, ValueError, "interpreter_lr"),
        ({"merger": None}, TypeError, "merger"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.IARED2(**arguments)


@pytest.mark.parametrize(
    ("vit", "strategy", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, {}, "no class token|this model has none"),
        ({}, {"groups": 4}, "groups=4 does not divide the model's 6 blocks"),
        ({}, {"heads": 5}, "heads=5 does not divide the model's width 32"),
    ],
)
def test_models_that_do_not_fit(vit, strategy, message):
    with pytest.raises(ValueError, match=message):
        small(tdm.IARED2(**strategy), **vit)


def test_comes_back_from_plain_values():
    strategy = tdm.IARED2(2, 0.4, 4, [1.0, 2.0], 3, 4, 1e-3)
    again = tdm.Strategy.from_config(strategy.config())
    assert again.config() == strategy.config()
    assert again.config()["init_args"]["penalty"] == [1.0, 2.0]
