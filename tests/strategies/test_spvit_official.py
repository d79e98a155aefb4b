"""SPViT: the official code, its layout and costs, and the selector by its definition."""

import pytest
import timm
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_official
from tdm_lightning.core import Role
from tdm_lightning.strategies.selector import MultiHeadSelector
from tests.helpers.spvits import small, without_noise

# The official code ----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_official_inference(official, shared):
    facts, tensors, model = official("spvit_a", tdm.SPViT(layers=(3, 6, 9), shared_heads=shared))
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    assert torch.equal(torch.stack(output.trace.token_counts) + 1, tensors["token_counts"])
    assert [layer.index for layer in output.trace.layers] == facts["method"]["reduction_layers"]
    before = torch.ones(3, 196, dtype=torch.bool)
    row = torch.arange(196).repeat(
        3, 1
    )  # patches come first in the official code, the packages behind them
    for stage, layer in enumerate(output.trace.layers):
        kept = tensors[f"keep_mask.{layer.index}"].bool()
        assert torch.equal(layer.role == Role.CLUSTERED, before & ~kept)
        row[before & ~kept] = 196 + stage
        before = kept
    for found, expected, mine, theirs in zip(
        output.features, tensors["features"], layer.assignment, row, strict=True
    ):
        torch.testing.assert_close(found[1:][mine], expected[1:][theirs], atol=2e-4, rtol=0)


@torch.no_grad()
def test_official_packages(official):
    facts, tensors, model = official("spvit_a", tdm.SPViT())
    entered = {}
    for index in facts["method"]["reduction_layers"]:
        hook = model.vit.blocks[index].norm1.register_forward_pre_hook
        hook(lambda module, inputs, index=index: entered.setdefault(index, inputs[0]))
    trace = model.trace(tensors["input"])[1]
    for layer in trace.layers:
        for image in range(3):
            first = (layer.role[image] == Role.CLUSTERED).nonzero()[0]
            package = entered[layer.index][image, 1 + layer.assignment[image, first]][0]
            torch.testing.assert_close(
                package, tensors[f"package_token.{layer.index}"][image], atol=1e-3, rtol=0
            )


@torch.no_grad()
def test_official_training(official, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    _, tensors, model = official("spvit_a", tdm.SPViT())
    scored = []
    for selector in model.strategy.score_predictor:
        selector.register_forward_hook(lambda module, inputs, output: scored.append(output))
    output = model.train().run(tensors["input"])
    torch.testing.assert_close(output.logits, tensors["train.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        output.features[:, 1:197], tensors["train.features"], atol=2e-4, rtol=0
    )
    assert torch.equal(torch.stack(output.state.decisions), tensors["train.stage_decisions"])
    assert torch.equal(output.state.decisions[-1].unsqueeze(-1), tensors["train.decision"])
    for index, (votes, probability) in zip((3, 6, 9), scored, strict=True):
        torch.testing.assert_close(votes, tensors[f"pred_score.{index}"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            probability, tensors[f"pred_softmax.{index}"][..., 0], atol=1e-4, rtol=0
        )


def test_official_layout_reports_what_does_not_fit(official, golden):
    _, tensors = golden("spvit_a")
    weights = {
        name[11:]: value for name, value in tensors.items() if name.startswith("state_dict.")
    }
    _, _, model = official("spvit_a", tdm.SPViT())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refused(message, changed):
        with pytest.raises(ValueError, match=message):
            load_official(
                model,
                {
                    name: value + 1 if value.is_floating_point() else value
                    for name, value in changed.items()
                },
            )
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    for name in (
        "score_predictor.1.senet.2.weight",
        "score_predictor.0.in_conv.0.1.bias",
        "score_predictor.2.out_conv.3.4.bias",
    ):
        refused(
            f"Missing from the file: strategy.{name}",
            {key: value for key, value in weights.items() if key != name},
        )
        refused(f"Of another shape: strategy.{name}", {**weights, name: torch.zeros(7)})
    refused(
        r"Not in the model: strategy.score_predictor.0.senet.4.bias",
        {**weights, "score_predictor.0.senet.4.bias": torch.ones(1)},
    )
    copy_ = "score_predictor.0.in_conv.2.1.weight"
    refused(rf"Copies that differ.*strategy\.{copy_}", {**weights, copy_: weights[copy_] + 1})
    with pytest.raises(ValueError, match="attach that method before loading"):
        load_official(model.vit, weights)

    _, _, apart = official("spvit_a", tdm.SPViT(shared_heads=False))  # there a head may differ
    report = load_official(apart, {**weights, copy_: weights[copy_] + 1})
    assert report == tdm.checkpoints.LoadReport("spvit")
    assert torch.equal(apart.strategy.score_predictor[0].in_conv[2][1].weight, weights[copy_] + 1)
    deit = {
        name: value for name, value in weights.items() if not name.startswith("score_predictor.")
    }
    assert load_official(model, deit).layout == "deit"  # where training starts


def test_its_own_weights_come_back(tmp_path):
    from safetensors.torch import save_file

    model = small()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = small(std=0.1)
    assert load_official(other, tmp_path / "w.safetensors").layout == "tdm-lightning"
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items()
    )


@pytest.mark.parametrize(
    ("name", "shared", "parameters"),
    [
        ("tiny", True, 5_738_236),
        ("small", True, 22_071_589),
        ("base", True, 86_588_932),
        ("small", False, 22_175_539),
    ],
)
def test_parameters(name, shared, parameters):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224")
    model = tdm.attach(vit, tdm.SPViT(shared_heads=shared))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "width", "heads", "gmacs"),
    [("tiny", 192, 3, 0.661), ("small", 384, 6, 2.448), ("base", 768, 12, 9.397)],
)
def test_multiply_accumulates_at_fixed_counts(name, width, heads, gmacs):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224")
    report = tdm.flops.mac_report(tdm.attach(vit, tdm.SPViT(fixed_count=True)))
    assert [block.tokens for block in report.blocks] == [196] * 3 + [121] * 3 + [74] * 3 + [29] * 3
    assert (report.backbone - report.learned) / 1e9 == pytest.approx(gmacs, abs=5e-4)
    entering = 196 + 121 + 74
    mlp = heads * (64 * 64 + 64 * 32 + 32 * 16 + 16 * 2)
    assert report.learned == entering * (mlp + 2 * heads * (heads // 2))
    assert report.strategy == entering * width  # the weighted sums


# Selectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_selector_against_its_definition(shared):
    selector = MultiHeadSelector(24, 3, shared)
    for parameter in selector.parameters():
        parameter.normal_(std=0.5)
    x, policy = torch.randn(2, 5, 24), torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    votes, probability = selector(x, policy)
    for image in range(2):
        slices = [x[image, :, 8 * head : 8 * head + 8] for head in range(3)]
        halves = []
        for head in range(3):
            h = selector.in_conv[0 if shared else head](slices[head])
            seen = [h[n, 4:] for n in range(5) if policy[image, n]]
            halves.append((h[:, :4], sum(seen) / len(seen)))
        for n in range(5):
            gate = selector.senet(torch.stack([part[n].mean() for part in slices]))
            total, keep = torch.zeros(2), torch.zeros(())
            for head, (local, mean) in enumerate(halves):
                logits = selector.out_conv[0 if shared else head](torch.cat((local[n], mean)))
                total += gate[head] * logits.log_softmax(-1)
                keep += gate[head] * logits.softmax(-1)[0]
            torch.testing.assert_close(votes[image, n], total / gate.sum(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                probability[image, n], keep / gate.sum(), atol=1e-5, rtol=1e-4
            )
    everyone, _ = selector(x)
    torch.testing.assert_close(everyone[1], votes[1])
    assert not torch.allclose(everyone[0], votes[0])
