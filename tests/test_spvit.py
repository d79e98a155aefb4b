"""SPViT: against the official code, and its packages, per image and at fixed counts."""

import copy
import functools

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_official
from tdm_lightning.ops import policy_softmax
from tdm_lightning.strategies.selector import MultiHeadSelector
from tdm_lightning.tokens import Output, Role

LABELS = torch.tensor([0, 1, 2, 3])


def without_noise(logits, tau=1, hard=False, dim=-1):
    return F.one_hot(logits.argmax(dim), logits.shape[dim]).to(logits.dtype)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def small(vit=None, std=0.6, **kwargs):
    """16 patches, 6 blocks, selectors that tell patches and images apart."""
    torch.manual_seed(3)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 4, "num_classes": 5, **(vit or {})}
    net = VisionTransformer(**arguments)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
                parameter.normal_(std=0.25)
        net.pos_embed.normal_(std=0.5)
    model = tdm.attach(net, tdm.SPViT(**{"layers": (1, 3), "targets": (0.6, 0.3), **kwargs}))
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    for selector in model.eval().strategy.score_predictor:
        balance(model, selector)
    return model


@torch.no_grad()
def balance(model, selector):
    """Shift a selector's logits until it would keep about half of what it sees, if it is asked at all."""
    seen = []
    hook = selector.register_forward_hook(lambda module, inputs, output: seen.append(output[0].diff(dim=2).flatten()))
    for image in torch.randn(8, 1, 3, 32, 32, generator=torch.Generator().manual_seed(7)):
        model(image)
    hook.remove()
    for mlp in selector.out_conv if seen else ():
        mlp[-1].bias[0] += torch.cat(seen).median()


def decide(model, keep, stage=None):
    """Selectors that keep, or drop, everything."""
    selectors = model.strategy.score_predictor
    for selector in selectors if stage is None else [selectors[stage]]:
        for mlp in selector.out_conv:
            torch.nn.init.zeros_(mlp[-1].weight)
            with torch.no_grad():
                mlp[-1].bias.copy_(torch.tensor([20.0, -20.0] if keep else [-20.0, 20.0]))
    return model


def masked_pass(model, images, training=False):
    """The definition, one image and token at a time: all tokens stay, dropped ones are seen by nobody but themselves."""
    vit, strategy, rows = model.vit, model.strategy, []
    for image in images:
        x = vit._pos_embed(vit.patch_embed(image[None]))[0]
        first = vit.num_prefix_tokens
        there, package, members = [1.0] * len(x), [False] * len(x), [1] * len(x)
        for index, block in enumerate(vit.blocks):
            if index in strategy.layers:
                selector = strategy.score_predictor[strategy.layers.index(index)]
                votes, q = selector(x[None, first:], torch.tensor([there[first:]]))
                falls = (votes[0, :, 0] <= votes[0, :, 1]).tolist()
                dropped = [j for j in range(first, len(x)) if there[j] and not package[j] and falls[j - first]]
                for j in dropped:
                    there[j], members[j] = 0.0, 0
                if dropped:
                    weights = [q[0, j - first] if strategy.package == "sum" else 1 / len(dropped) for j in dropped]
                    new = sum(weight * x[j] for weight, j in zip(weights, dropped, strict=True))
                    x, there, package, members = (
                        torch.cat((x, new[None])),
                        [*there, 1.0],
                        [*package, True],
                        [*members, len(dropped)],
                    )
            seen = torch.eye(len(x)).bool() | torch.tensor(there).bool()
            q_, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
            weights = (q_ @ k.transpose(-2, -1) * block.attn.scale).masked_fill(~seen, -torch.inf).softmax(-1)
            x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
        kept = torch.tensor(there).bool()
        size = torch.tensor(members[first:])[kept[first:]].float()
        rows.append((model.forward_head(vit.norm(x[kept])[None], size[None]), int(kept[first:].sum())))
    return torch.cat([logits for logits, _ in rows]), [count for _, count in rows]


# The official code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_official_inference(official, shared):
    facts, tensors, model = official("spvit_a", tdm.SPViT(layers=(3, 6, 9), shared_heads=shared))
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    assert torch.equal(torch.stack(output.trace.token_counts) + 1, tensors["token_counts"])
    assert [layer.index for layer in output.trace.layers] == facts["method"]["reduction_layers"]
    before = torch.ones(3, 196, dtype=torch.bool)
    row = torch.arange(196).repeat(3, 1)  # patches come first in the official code, the packages behind them
    for stage, layer in enumerate(output.trace.layers):
        kept = tensors[f"keep_mask.{layer.index}"].bool()
        assert torch.equal(layer.role == Role.CLUSTERED, before & ~kept)
        row[before & ~kept] = 196 + stage
        before = kept
    for found, expected, mine, theirs in zip(output.features, tensors["features"], layer.assignment, row, strict=True):
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
            torch.testing.assert_close(package, tensors[f"package_token.{layer.index}"][image], atol=1e-3, rtol=0)


@torch.no_grad()
def test_official_training(official, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    _, tensors, model = official("spvit_a", tdm.SPViT())
    scored = []
    for selector in model.strategy.score_predictor:
        selector.register_forward_hook(lambda module, inputs, output: scored.append(output))
    output = model.train().run(tensors["input"])
    torch.testing.assert_close(output.logits, tensors["train.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features[:, 1:197], tensors["train.features"], atol=2e-4, rtol=0)
    assert torch.equal(torch.stack(output.carry["decisions"]), tensors["train.stage_decisions"])
    assert torch.equal(output.carry["decisions"][-1].unsqueeze(-1), tensors["train.decision"])
    for index, (votes, probability) in zip((3, 6, 9), scored, strict=True):
        torch.testing.assert_close(votes, tensors[f"pred_score.{index}"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(probability, tensors[f"pred_softmax.{index}"][..., 0], atol=1e-4, rtol=0)


def test_official_layout_reports_what_does_not_fit(official, golden):
    _, tensors = golden("spvit_a")
    weights = {name[11:]: value for name, value in tensors.items() if name.startswith("state_dict.")}
    _, _, model = official("spvit_a", tdm.SPViT())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refused(message, changed):
        with pytest.raises(ValueError, match=message):
            load_official(model, {name: value + 1 if value.is_floating_point() else value for name, value in changed.items()})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    for name in (
        "score_predictor.1.senet.2.weight",
        "score_predictor.0.in_conv.0.1.bias",
        "score_predictor.2.out_conv.3.4.bias",
    ):
        refused(f"Missing from the file: strategy.{name}", {key: value for key, value in weights.items() if key != name})
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
    deit = {name: value for name, value in weights.items() if not name.startswith("score_predictor.")}
    assert load_official(model, deit).layout == "deit"  # where training starts


def test_its_own_weights_come_back(tmp_path):
    from safetensors.torch import save_file

    model = small()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = small(std=0.1)
    assert load_official(other, tmp_path / "w.safetensors").layout == "tdm-lightning"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shared", "parameters"),
    [("tiny", True, 5_738_236), ("small", True, 22_071_589), ("base", True, 86_588_932), ("small", False, 22_175_539)],
)
def test_parameters(name, shared, parameters):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224")
    model = tdm.attach(vit, tdm.SPViT(shared_heads=shared))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "width", "heads", "gmacs"), [("tiny", 192, 3, 0.661), ("small", 384, 6, 2.448), ("base", 768, 12, 9.397)]
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


# Selectors -----------------------------------------------------------------------------------------------------------


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
            torch.testing.assert_close(probability[image, n], keep / gate.sum(), atol=1e-5, rtol=1e-4)
    everyone, _ = selector(x)
    torch.testing.assert_close(everyone[1], votes[1])
    assert not torch.allclose(everyone[0], votes[0])


# Inference, image by image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["sum", "mean"])
@pytest.mark.parametrize(
    "vit",
    [
        {},
        {"reg_tokens": 2},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg"},
        {"global_pool": "map", "class_token": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_removal_gives_what_masking_gives(images, package, vit):
    model = small(vit, package=package)
    logits, trace = model.trace(images)
    expected, counts = masked_pass(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert trace.token_counts[-1].tolist() == counts
    assert len(set(counts)) > 1
    assert max(counts) < 16


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images, fixed):
    model = small(fixed_count=fixed)
    together, trace = model.trace(images)
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])
            assert torch.equal(layer.role[i], single.role[0])


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_every_patch_is_kept_or_packed(images, fixed):
    trace = small(fixed_count=fixed).trace(images)[1]
    assert [layer.index for layer in trace.layers] == [1, 3]
    for layer in trace.layers:
        counts = trace.token_counts[layer.index]
        for image in range(4):
            held = set(layer.assignment[image].tolist())
            assert held == set(range(counts if fixed else counts[image]))
            packed = layer.assignment[image][layer.role[image] == Role.CLUSTERED]
            assert (packed == len(held) - 1).all()  # the newest package is the last token
        assert (layer.role == Role.CLUSTERED).any()
        assert (layer.role != Role.DROPPED).all()
    assert model_sizes_add_up(small({"global_pool": "avg"}, fixed_count=fixed), images)


def model_sizes_add_up(model, images):
    return model.run(images).size.sum(1).tolist() == [16] * len(images)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("package", ["sum", "mean"])
@pytest.mark.parametrize("training", [False, True])
def test_an_image_may_lose_all_of_its_patches(images, pool, package, training, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", lambda x, **_: without_noise(x) + x - x.detach())
    model = decide(small({"global_pool": pool}, package=package), keep=False, stage=0).train(training)
    output = model.run(images, trace=True)
    assert output.logits.isfinite().all()
    for layer in output.trace.layers:
        assert (layer.assignment == (16 if training else 0)).all()
    output.logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if not training:
        assert [count.tolist() for count in output.trace.token_counts] == [[16] * 4] + [[1] * 4] * 5
        expected, _ = masked_pass(model, images)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("package", ["sum", "mean"])
@torch.no_grad()
def test_keeping_everything_is_the_plain_model(images, package, monkeypatch):
    """A package of nothing is not there at inference, and seen by nobody in training."""
    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    model = decide(small(package=package), keep=True)
    torch.testing.assert_close(model(images), model.vit(images), atol=1e-6, rtol=1e-6)
    assert model.trace(images)[1].token_counts[-1].tolist() == [16] * 4
    model.strategy.train()
    torch.testing.assert_close(model(images), model.vit(images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_image_packs_nothing_and_another_everything(images):
    model = small()

    def opposite(module, inputs, output):
        votes, probability = output
        sign = torch.tensor([1.0, -1.0])
        return torch.stack((sign, -sign), dim=1)[: len(votes), None, :].expand_as(votes), probability

    for selector in model.strategy.score_predictor:
        selector.register_forward_hook(opposite)
    logits, trace = model.trace(images[:2])
    assert [count.tolist() for count in trace.token_counts] == [[16, 16]] + [[16, 1]] * 5
    torch.testing.assert_close(logits[0], model.vit(images[:1])[0], atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


@torch.no_grad()
def test_fewer_rows_enter_the_matmuls(images):
    """Multiply-accumulates as if each image had as many tokens as the longest."""
    model = small()
    longest = [int(count.max()) + 1 for count in model.trace(images)[1].token_counts]
    assert longest[-1] <= longest[1] < 17
    report = tdm.flops.mac_report(model, images=images)
    for block, n in zip(report.blocks, longest, strict=True):
        assert block.attention == 4 * n * 32**2 + 2 * n**2 * 32
        assert block.mlp == 8 * n * 32**2


@torch.no_grad()
def test_noise_only_where_asked_for(images):
    model, noisy = small(std=0.3), small(std=0.3, stochastic=True)
    state = torch.get_rng_state()
    assert torch.equal(model(images), model(images))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisy(images), noisy(images))
    for fixed in (small(fixed_count=True, std=0.3), small(fixed_count=True, std=0.3, stochastic=True)):
        kept = [fixed.trace(images)[1].layers[0].role for _ in range(2)]
        assert torch.equal(*kept) != fixed.strategy.stochastic


# Fixed counts --------------------------------------------------------------------------------------------------------


def test_which_mode_is_adaptive():
    assert tdm.SPViT().adaptive
    assert not tdm.SPViT(fixed_count=True).adaptive
    assert tdm.SPViT().targets == (0.617, 0.369, 0.137)
    assert tdm.SPViT(layers=(2, 5)).targets == pytest.approx((0.617, 0.617**2))


@torch.no_grad()
def test_fixed_counts_keep_the_best(images):
    model = small(fixed_count=True)
    trace = model.trace(images)[1]
    assert trace.token_counts == [16, 10, 10, 6, 6, 6]  # 9 of 16 and one package, then 4 and two
    first = trace.layers[0]
    kept = first.role == Role.KEPT
    assert kept.sum(1).tolist() == [9] * 4
    lowest = first.importance.masked_fill(~kept, torch.inf).amin(1)
    assert (lowest > first.importance.masked_fill(kept, -torch.inf).amax(1)).all()
    for image in range(4):  # in their order
        assert first.assignment[image][kept[image]].tolist() == list(range(9))


@torch.no_grad()
def test_fixed_counts_that_an_image_would_choose_give_the_same(images):
    model = small(targets=(0.99, 0.98))
    for image in images:
        trace = model.trace(image[None])[1]
        packages = torch.tensor([(layer.role == Role.CLUSTERED).any() for layer in trace.layers]).cumsum(0).tolist()
        patches = [trace.token_counts[layer.index].item() - n for layer, n in zip(trace.layers, packages, strict=True)]
        assert patches[-1] < 16
        fixed = tdm.attach(
            model.vit, tdm.SPViT(layers=(1, 3), targets=[(n + 0.5) / 16 for n in patches], fixed_count=True)
        ).eval()
        fixed.strategy.load_state_dict(model.strategy.state_dict())
        torch.testing.assert_close(fixed(image[None]), model(image[None]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_target_of_1_is_the_plain_model(images):
    model = small(fixed_count=True, targets=(1.0, 1.0))
    assert torch.equal(model(images), model.vit(images))
    assert model.trace(images)[1].layers == []
    later = small(fixed_count=True, targets=(1.0, 0.5))
    assert later.trace(images)[1].token_counts == [16, 16, 16, 9, 9, 9]


SHAPES = ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.mark.parametrize("merger", [None, tdm.TokenMerger()], ids=["package", "merger"])
@torch.no_grad()
def test_fixed_counts_compile_and_export(images, merger):
    model = small(fixed_count=True, merger=merger)
    eager = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), eager, atol=1e-4, rtol=1e-4)
    program = torch.export.export(model, (images,), dynamic_shapes=SHAPES)
    for size in (1, 3):
        torch.testing.assert_close(program.module()(images[:size]), eager[:size], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(images), eager)


@torch.no_grad()
def test_fixed_counts_export_to_onnx(images, tmp_path):
    import onnxruntime

    model = small(fixed_count=True)
    torch.onnx.export(model, (images,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=SHAPES, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 3):
        (found,) = session.run(None, {session.get_inputs()[0].name: images[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images[:size]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"fixed_count": True}, {"fixed_count": True, "merger": tdm.TokenMerger()}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite(images, kwargs, dtype):
    model = small(**kwargs)
    model.vit.pos_embed.mul_(30)
    logits = model.to(dtype)(images.to(dtype))
    assert logits.isfinite().all()
    assert logits.dtype == dtype


@pytest.mark.parametrize("kwargs", [{}, {"fixed_count": True}], ids=str)
@torch.no_grad()
def test_a_pass_leaves_no_state_behind(images, kwargs):
    model = small(**kwargs)
    before = copy.deepcopy(model)
    alone, traced, whole = model(images[:1]), model.trace(images)[0], model(images)
    assert torch.equal(model(images[:1]), alone)
    torch.testing.assert_close(traced, whole)
    assert torch.equal(before(images), whole)
    assert vars(model.strategy).keys() == vars(before.strategy).keys()


@torch.no_grad()
def test_dense_features_follow_every_patch(images):
    """A packed patch has the feature of its package."""
    model = small()
    output = model.run(images, trace=True)
    maps = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, norm=True)
    last = output.trace.layers[-1].assignment
    for image in range(4):
        torch.testing.assert_close(maps[-1][image], output.features[image, 1:][last[image]], atol=1e-5, rtol=1e-4)


def test_positions_follow_the_tokens(images):
    """In a model with rotary positions a package stands where the best of its patches stood."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    vit = timm.models.eva.Eva(**shape, use_rot_pos_emb=True, use_abs_pos_emb=False).eval()
    model = tdm.attach(vit, tdm.SPViT(layers=(1, 3)))
    with torch.no_grad():
        for selector in model.strategy.score_predictor:
            for parameter in selector.parameters():
                parameter.normal_()
            balance(model, selector)
    placed = {}
    before_block = model.strategy.before_block

    def spy(index, tokens):
        placed[index] = before_block(index, tokens)
        return placed[index]

    model.strategy.before_block = spy
    trace = model.trace(images)[1]
    layer, position = trace.layers[0], placed[1].position
    for image in range(4):
        kept = layer.role[image] == Role.KEPT
        assert position[image][layer.assignment[image][kept]].tolist() == kept.nonzero().flatten().tolist()
        if not kept.all():
            package = layer.assignment[image][~kept][0]
            assert position[image][package] == layer.importance[image].masked_fill(kept, -torch.inf).argmax()
    assert (layer.role == Role.CLUSTERED).any()


# Training ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_training_computes_what_inference_does(images, monkeypatch):
    """Without noise and ε, pooling over patches included."""
    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    monkeypatch.setattr("tdm_lightning.vit.attention.policy_softmax", functools.partial(policy_softmax, eps=0))
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
    first, second = output.carry["decisions"]
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
        terms = model.strategy.loss(model.run(images), LABELS, F.cross_entropy, teacher)
    sum(terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_losses_by_hand(images):
    model = small(std=0.2).train()
    output, teacher = model.run(images), tdm.attach(copy.deepcopy(model.vit), tdm.Strategy()).eval().run(images)
    terms = model.strategy.loss(output, LABELS, F.cross_entropy, teacher)
    first, second = output.carry["decisions"]
    ratio = ((first.mean() - 0.6) ** 2 + (second.mean() - 0.3) ** 2) / 2
    kl = F.kl_div(output.logits.log_softmax(1), teacher.logits.log_softmax(1), reduction="batchmean", log_target=True)
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
    assert not alone.strategy.needs_teacher
    torch.testing.assert_close(alone.strategy.loss(output, LABELS, F.cross_entropy)["ratio"], ratio)


def test_only_the_batch_is_held_to_the_targets():
    decision = torch.zeros(2, 10)
    decision[0] = 1  # one image keeps all, the other none
    output = Output(torch.zeros(2, 5), torch.zeros(2, 11, 8), None, {"initial": 10, "decisions": (decision,)})
    strategy = tdm.SPViT(layers=(1,), targets=(0.5,), distill_weight=0, token_weight=0)
    assert strategy.loss(output, LABELS[:2], F.cross_entropy)["ratio"] == 0


def test_losses_ask_for_what_they_need(images):
    model = small().train()
    output = model.run(images)
    with pytest.raises(ValueError, match="SPViT distils from the unreduced model: pass its output as teacher"):
        model.strategy.loss(output, LABELS, F.cross_entropy)
    with pytest.raises(ValueError, match=r"SPViT's predictors only learn in training mode: call model.train\(\)"):
        model.strategy.loss(model.eval().run(images), LABELS, F.cross_entropy)


def test_the_ratio_loss_moves_the_kept_share_to_the_targets():
    torch.manual_seed(1)
    model = small(std=0.2, ratio_weight=10.0, distill_weight=0, token_weight=0).train()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.strategy.parameters(), lr=1e-2)
    history = []
    for _ in range(80):
        output = model.run(images)
        history.append([decision.mean().item() for decision in output.carry["decisions"]])
        optimizer.zero_grad()
        sum(model.strategy.loss(output, labels, F.cross_entropy).values()).backward()
        optimizer.step()
    late = torch.tensor(history[-15:]).mean(0)
    assert late.tolist() == pytest.approx([0.6, 0.3], abs=0.06)
    assert max(abs(history[0][0] - 0.6), abs(history[0][1] - 0.3)) > 0.06


def test_optimizer_groups():
    model = small()
    groups = model.strategy.param_groups(model, lr=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert set(names.values()) - set(found) == {"vit.pos_embed", "vit.cls_token"}
    for name, group in found.items():
        own, decays = name.startswith("strategy."), model.get_parameter(name).ndim > 1
        assert group["lr"] == pytest.approx(1e-3 if own else 1e-5)
        assert group.get("freeze_epochs", 0) == (0 if own else 5)
        assert group["weight_decay"] == (0.05 if decays else 0.0)
    torch.optim.AdamW(groups)
    from_scratch = small(backbone_lr_scale=None)
    assert from_scratch.strategy.param_groups(from_scratch, lr=1e-3, weight_decay=0.05) is None


# The merger ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_merger_keeps_the_counts_and_the_attentive_patches(images):
    packing, model = small(fixed_count=True), small(fixed_count=True, merger=tdm.TokenMerger())
    (logits, merged), (others, packed) = model.trace(images), packing.trace(images)
    assert merged.token_counts == [16, 9, 9, 4, 4, 4]
    assert torch.equal(merged.layers[0].importance, packed.layers[0].importance)
    assert torch.equal(merged.layers[0].role == Role.CLUSTERED, packed.layers[0].role == Role.CLUSTERED)
    assert (merged.layers[0].assignment >= 0).all()
    assert (logits - others).abs().amax(1).min() > 1e-4


def test_training_with_the_merger_merges_for_real(images):
    model = small(fixed_count=True, merger=tdm.TokenMerger(), std=0.2).train()
    output = model.run(images)
    assert output.features.shape[1] == 1 + 4
    assert output.carry["holder"].shape == (4, 16)
    teacher = tdm.attach(copy.deepcopy(model.vit), tdm.Strategy()).eval().run(images)
    terms = model.strategy.loss(output, LABELS, F.cross_entropy, teacher)
    held = F.one_hot(output.carry["holder"], 4).float()
    mean = held.transpose(1, 2) @ teacher.features[:, 1:] / held.sum(1).unsqueeze(-1)
    torch.testing.assert_close(terms["tokens"], 0.5 * F.mse_loss(output.features[:, 1:], mean))
    shares = torch.stack([decision.sum(1).mean() / 16 for decision in output.carry["decisions"]])
    torch.testing.assert_close(terms["ratio"], 2 * ((shares - torch.tensor([0.6, 0.3])) ** 2).mean())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": 0.7}, TypeError, "sequence of shares"),
        ({"targets": (0.5, 0.3)}, ValueError, "one share for each"),
        ({"targets": (0.5, 0.6, 0.3)}, ValueError, "cannot grow"),
        ({"targets": (0.5, 0.3, 0.0)}, ValueError, r"\(0, 1\]"),
        ({"targets": (0.5, float("nan"), 0.1)}, ValueError, r"\(0, 1\]"),
        ({"layers": (3, 3)}, ValueError, "repeat"),
        ({"package": "max"}, ValueError, "'sum', 'mean'"),
        ({"merger": tdm.TokenMerger()}, ValueError, "fixed_count=True"),
        ({"merger": "yes", "fixed_count": True}, TypeError, "TokenMerger or None"),
        ({"merger": tdm.TokenMerger(features="keys"), "fixed_count": True}, ValueError, "merges before a block"),
        ({"ratio_weight": -1}, ValueError, "ratio_weight"),
        ({"token_weight": "0.5"}, TypeError, "token_weight"),
        ({"freeze_epochs": 1.5}, TypeError, "freeze_epochs"),
        ({"backbone_lr_scale": -0.1}, ValueError, "backbone_lr_scale"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.SPViT(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": (1, 6)}, "do not exist"),
        ({"targets": (0.5, 0.05), "fixed_count": True}, "leaves none of 16 patches at layer 3"),
        (
            {"targets": (0.4, 0.3), "fixed_count": True, "merger": tdm.TokenMerger(attentive_ratio=1.0)},
            "no feasible split of 16 tokens into 6",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_comes_back_from_plain_values():
    strategy = tdm.SPViT(layers=(2, 4), fixed_count=True, merger=tdm.TokenMerger(), package="mean", shared_heads=False)
    again = tdm.Strategy.from_config(strategy.config())
    assert type(again) is tdm.SPViT
    assert again.config() == strategy.config()
    assert not again.adaptive
