"""DynamicViT: against the official code, in training and at inference, and with the merger."""

import math

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import Output, Role, Tokens
from tdm_lightning.ops import policy_softmax
from tdm_lightning.vit.adapters import model_info
from tdm_lightning.vit.adapters.parts import run_attention
from tests.helpers.vits import grouped


def without_noise(logits, tau=1, hard=False, dim=-1):
    return F.one_hot(logits.argmax(dim), logits.shape[dim]).to(logits.dtype)


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


def small(**kwargs):
    """16 patches, 6 blocks, predictors that tell tokens apart."""
    model = tdm.attach(
        timm.create_model("test_vit", img_size=64, num_classes=5),
        tdm.DyViT(0.6, layers=(1, 3), **kwargs),
    )
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


# The official code ----------------------------------------------------------------------------


@torch.no_grad()
def test_official_inference(official):
    facts, tensors, model = official("dynamicvit_a", tdm.DyViT(0.7))
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features, tensors["features"], atol=2e-4, rtol=0)
    assert [count + 1 for count in output.trace.token_counts] == tensors["token_counts"].tolist()
    for layer, count in zip(output.trace.layers, facts["method"]["tokens_kept"], strict=True):
        kept = tensors[f"kept_patch.{layer.index}"]
        assert torch.equal(layer.assignment.gather(1, kept), torch.arange(count).expand(3, -1))
        assert (layer.role == Role.KEPT).sum(1).tolist() == [count] * 3
        torch.testing.assert_close(
            layer.importance, tensors[f"pred_score.{layer.index}"][..., 0], atol=1e-4, rtol=0
        )


@pytest.fixture
def official_training(official, monkeypatch):
    """The model in training mode, without Gumbel noise."""
    monkeypatch.setattr(F, "gumbel_softmax", without_noise)

    def run(**kwargs):
        _, tensors, model = official("dynamicvit_a", tdm.DyViT(0.7, **kwargs))
        return tensors, model.train(), model.run(tensors["input"])

    return run


def test_official_training(official_training):
    tensors, _, output = official_training()
    torch.testing.assert_close(output.logits, tensors["train.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features[:, 1:], tensors["train.features"], atol=2e-4, rtol=0)
    assert torch.equal(torch.stack(output.state.decisions), tensors["train.stage_decisions"])


@pytest.mark.parametrize(
    ("case", "kwargs"),
    [("mse", {}), ("kl", {"token_loss": "kl"}), ("mse_dynamic", {"ratio_per_image": False})],
)
def test_official_losses(official_training, case, kwargs):
    tensors, model, output = official_training(**kwargs)
    features = torch.cat((torch.randn(3, 1, 48), tensors["loss.teacher_features"]), dim=1)
    teacher = Output(tensors["loss.teacher_logits"], features, None, {})
    terms = model.objective.loss(output, tensors["loss.labels"], F.cross_entropy, teacher)
    official = {
        "task": ("cls", 1),
        "ratio": ("ratio", 2 / 3),
        "distillation": ("cls_kl", 0.5),
        "tokens": ("token", 0.5),
    }
    assert terms.keys() == official.keys()
    for name, (theirs, weight) in official.items():
        torch.testing.assert_close(
            terms[name], weight * tensors[f"loss.{case}.{theirs}"], rtol=1e-4, atol=0
        )
    torch.testing.assert_close(
        sum(terms.values()), tensors[f"loss.{case}.total"], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("tiny", 5_899_582, 801_198_048),
        ("small", 22_774_414, 2_980_897_728),
        ("base", 89_452_846, 11_475_801_984),
    ],
)
def test_parameters_and_multiply_accumulates(name, parameters, macs):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224")
    model = tdm.attach(vit, tdm.DyViT(0.7))
    assert sum(p.numel() for p in model.parameters()) == parameters
    report = tdm.flops.mac_report(model)
    assert report.backbone == tdm.flops.count_macs(model) == macs
    assert report.learned > 0
    assert report.strategy == 0


# Attention under a policy ---------------------------------------------------------------------


def test_policy_softmax_against_its_definition():
    logits, policy, eps = torch.randn(2, 3, 5, 5, dtype=torch.float64) * 3, torch.rand(2, 5), 1e-6
    found = policy_softmax(logits, policy)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                row = logits[b, h, i].tolist()
                e = [
                    math.exp(s - max(row)) * (1 if i == j else policy[b, j].item())
                    for j, s in enumerate(row)
                ]
                expected = [(value + eps / 5) / (sum(e) + eps) for value in e]
                assert found[b, h, i].tolist() == pytest.approx(expected, rel=1e-5)


def test_policy_of_ones_is_the_softmax_up_to_epsilon():
    logits = torch.randn(2, 3, 50, 50)
    assert (policy_softmax(logits, torch.ones(2, 50)) - logits.softmax(-1)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_finite_where_the_policy_is_zero(dtype):
    logits = (torch.randn(1, 2, 6, 6) * 50).to(dtype).requires_grad_()
    policy = torch.tensor([[1.0, 0, 0, 1, 0, 0]], requires_grad=True)
    policy_softmax(logits, policy).square().sum().backward()
    assert logits.grad.isfinite().all()
    assert policy.grad.isfinite().all()
    assert policy.grad[0, 1] != 0  # a dropped token still learns whether it was missed


def explicit(attention, tokens):
    """An attention under a policy."""
    return run_attention(attention, tokens.x, tokens, 0, frozenset())[0]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"qkv_bias": True}],
    ids=str,
)
def test_explicit_attention_is_timms(kwargs):
    attention = Attention(32, num_heads=4, norm_layer=torch.nn.LayerNorm, **kwargs).eval()
    x, bias = torch.randn(2, 9, 32), torch.randn(2, 1, 1, 9)
    tokens = Tokens(x, 1, info=None, policy=torch.ones(2, 9))
    torch.testing.assert_close(explicit(attention, tokens), attention(x), atol=1e-5, rtol=1e-4)
    biased = explicit(attention, tokens.replace(key_bias=bias))
    torch.testing.assert_close(biased, attention(x, attn_mask=bias), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["DiffAttention", "DiffParallelScalingBlock", "ParallelScalingBlock"]
)
def test_training_needs_plain_attention(kind):
    from timm.layers import DiffAttention
    from timm.models import vision_transformer as timm_vit

    chosen = (
        {"attn_layer": DiffAttention}
        if kind == "DiffAttention"
        else {"block_fn": getattr(timm_vit, kind)}
    )
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, **chosen
    ).eval()
    model, images = tdm.attach(vit, tdm.DyViT(0.6, layers=(1,))), torch.randn(2, 3, 32, 32)
    assert model(images).isfinite().all()  # inference needs no policy
    with pytest.raises(TypeError, match="timm's Attention"):
        model.train()(images)


# Training without a merger --------------------------------------------------------------------


def test_a_dropped_token_never_returns_and_is_seen_by_nobody(images):
    model = small().train()
    output = model.run(images)
    first, second = output.state.decisions
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (second <= first).all()
    assert output.features.shape == (3, 17, model.embed_dim)

    def class_token(changed):
        policy = torch.ones(1, 17)
        policy[0, 5] = 0
        x = torch.ones(1, 17, 64).cumsum(1).sin()
        x[0, 5] += changed
        tokens = Tokens(x, 1, model_info(model.vit), policy=policy)
        found = explicit(model.vit.blocks[0].attn, tokens)
        return found[0, [i for i in range(17) if i != 5]]

    torch.testing.assert_close(class_token(0.0), class_token(3.0), atol=1e-4, rtol=0)


def test_sampling_varies_in_training_only(images):
    model = small().train()
    assert not torch.equal(
        model.run(images).state.decisions[0], model.run(images).state.decisions[0]
    )
    model.eval()
    assert torch.equal(model(images), model(images))
    assert model.run(images).state.decisions is None


def test_a_model_ready_for_inference_is_pruned(images):
    """Attaching gives the strategy the model's own mode."""
    model = tdm.attach(
        timm.create_model("test_vit", img_size=64).eval(), tdm.DyViT(0.6, layers=(1, 3))
    )
    assert model.trace(images)[1].token_counts == [16, 9, 9, 5, 5, 5]


@pytest.mark.parametrize(
    "merger", [None, tdm.TokenMerger(), tdm.TokenMerger(proportional_attention=True)]
)
def test_the_task_alone_reaches_predictors_and_backbone(images, merger):
    model = small(merger=merger).train()
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_ratio_loss_moves_the_kept_share_to_the_schedule():
    torch.manual_seed(1)
    model = small(ratio_weight=10.0, distill_weight=0, token_weight=0).train()
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.strategy.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        output = model.run(images)
        terms = model.objective.loss(output, labels, F.cross_entropy)
        history.append([decision.mean().item() for decision in output.state.decisions])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    late = torch.tensor(history[-15:]).mean(0)
    assert late.tolist() == pytest.approx([0.6, 0.36], abs=0.06)


def test_no_kept_token_gives_no_token_loss(monkeypatch):
    images = torch.randn(2, 3, 64, 64)
    monkeypatch.setattr(
        F, "gumbel_softmax", lambda x, **_: F.one_hot(torch.ones_like(x[..., 0]).long(), 2) + 0 * x
    )
    model = small().train()
    teacher = tdm.attach(model.vit, tdm.Strategy()).run(images)
    terms = model.objective.loss(model.run(images), torch.tensor([0, 1]), F.cross_entropy, teacher)
    assert terms["tokens"] == 0
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# The merger -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_merger_keeps_the_schedule_and_the_attentive_tokens(images):
    model = small(merger=tdm.TokenMerger()).eval()
    dropping = tdm.attach(model.vit, tdm.DyViT(0.6, layers=(1, 3))).eval()
    dropping.strategy.load_state_dict(model.strategy.state_dict())
    logits, merged = model.trace(images)
    others, dropped = dropping.trace(images)
    assert merged.token_counts == dropped.token_counts == [16, 9, 9, 5, 5, 5]
    first, plain = merged.layers[0], dropped.layers[0]
    assert torch.equal(first.importance, plain.importance)
    assert torch.equal(first.role == Role.CLUSTERED, plain.role == Role.DROPPED)
    assert (first.assignment >= 0).all()
    assert (logits - others).abs().amax(1).min() > 1e-4


@torch.no_grad()
def test_merged_tokens_are_weighted_by_the_keep_probability(images):
    model = small(merger=tdm.TokenMerger()).eval()
    seen = {}

    class Spy(tdm.TokenMerger):
        def __call__(self, given, keep):
            seen.setdefault("x", given.x), seen.setdefault("importance", given.importance)
            seen.setdefault("reduction", super().__call__(given, keep))
            return super().__call__(given, keep)

    model.strategy.merger = Spy()
    _, trace = model.trace(images)
    probability, reduction = trace.layers[0].importance.exp(), seen["reduction"]
    torch.testing.assert_close(seen["importance"], probability)
    member = F.one_hot(reduction.assignment, 9).float() * probability.unsqueeze(-1)
    expected = (member / member.sum(1, keepdim=True)).transpose(1, 2) @ seen["x"]
    torch.testing.assert_close(reduction.x, expected, atol=1e-5, rtol=1e-4)


def test_training_with_the_merger_merges_for_real(images):
    model = small(merger=tdm.TokenMerger()).train()
    output = model.run(images)
    assert output.features.shape[1] == 1 + 5
    assert output.state.holder.shape == (3, 16)
    assert output.state.holder.unique().tolist() == list(range(5))
    teacher = tdm.attach(model.vit, tdm.Strategy()).run(images)
    terms = model.objective.loss(output, torch.tensor([0, 1, 2]), F.cross_entropy, teacher)
    held = F.one_hot(output.state.holder, 5).float()
    mean = held.transpose(1, 2) @ teacher.features[:, 1:] / held.sum(1).unsqueeze(-1)
    torch.testing.assert_close(terms["tokens"], 0.5 * F.mse_loss(output.features[:, 1:], mean))
    shares = torch.stack([decision.sum(1) / 16 for decision in output.state.decisions])
    ratio = ((shares - torch.tensor([[0.6], [0.36]])) ** 2).mean()
    torch.testing.assert_close(terms["ratio"], 2 * ratio)


@torch.no_grad()
def test_the_policy_of_merged_tokens_changes_nothing_forward(images, monkeypatch):
    """Without noise, training with the merger computes what inference does, up to ε."""
    monkeypatch.setattr(F, "gumbel_softmax", lambda x, **_: x.exp())
    model = small(merger=tdm.TokenMerger()).eval()
    expected = model(images)
    model.strategy.train()
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("merger", "error", "message"),
    [
        ("yes", TypeError, "must be a Merger such as"),
        (tdm.TokenMerger(features="keys"), ValueError, "merges before a block"),
        (tdm.TokenMerger(features="normed"), ValueError, "merges before a block"),
    ],
)
def test_mergers_that_do_not_fit(merger, error, message):
    for make in (tdm.DyViT, tdm.EvoViT):
        with pytest.raises(error, match=message):
            make(merger=merger)


def test_a_split_that_is_not_feasible_is_refused_at_once():
    strategy = tdm.DyViT(0.4, layers=(1,), merger=tdm.TokenMerger(attentive_ratio=1.0))
    with pytest.raises(ValueError, match="no feasible split of 16 tokens into 6"):
        tdm.attach(timm.create_model("test_vit", img_size=64), strategy)


# Losses, teacher, optimizer -------------------------------------------------------------------


def test_which_settings_need_a_teacher():
    assert tdm.DyViT().requires().teacher
    assert tdm.DyViT(distill_weight=0).requires().teacher
    assert not tdm.DyViT(distill_weight=0, token_weight=0).requires().teacher
    assert not tdm.EViT().requires().teacher


def test_losses_ask_for_what_they_need(images):
    model, labels = small().train(), torch.tensor([0, 1, 2])
    output = model.run(images)
    with pytest.raises(ValueError, match=r"pass its output as teacher, or set distill_weight=0"):
        model.objective.loss(output, labels, F.cross_entropy)
    for other in (
        timm.create_model("test_vit", img_size=64, num_classes=7),
        timm.create_model("test_vit", img_size=32, num_classes=5),
        VisionTransformer(
            img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5
        ),
    ):
        side = other.patch_embed.img_size[0]
        teacher = tdm.attach(other, tdm.Strategy()).run(images[..., :side, :side])
        with pytest.raises(ValueError, match="must be the same timm model, unreduced"):
            model.objective.loss(output, labels, F.cross_entropy, teacher)
    with pytest.raises(ValueError, match=r"call model.train\(\)"):
        model.objective.loss(model.eval().run(images), labels, F.cross_entropy)


def test_optimizer_groups():
    model = small()
    groups, found = grouped(model)
    assert {name for name, _ in model.named_parameters()} - set(found) == {
        "vit.pos_embed",
        "vit.cls_token",
    }
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, group in found.items():
        own, decays = name.startswith("strategy."), model.get_parameter(name).ndim > 1
        assert group["lr"] == 1e-3
        assert group["lr_scale"] == (1.0 if own else 0.01)
        assert group["freeze_epochs"] == (0 if own else 5)
        assert group["weight_decay"] == (0.05 if decays else 0.0)
    torch.optim.AdamW(groups)
    from_scratch = small(backbone_lr_scale=None)
    assert from_scratch.strategy.param_groups(from_scratch, lr=1e-3, weight_decay=0.05) is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio_weight": -1}, ValueError, "ratio_weight"),
        ({"distill_weight": float("nan")}, ValueError, "distill_weight"),
        ({"token_weight": "0.5"}, TypeError, "token_weight"),
        ({"token_loss": "l1"}, ValueError, "token_loss"),
        ({"freeze_epochs": 1.5}, TypeError, "freeze_epochs"),
        ({"backbone_lr_scale": -0.1}, ValueError, "backbone_lr_scale"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.DyViT(**arguments)
