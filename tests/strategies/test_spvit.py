"""SPViT at inference: its packages, image by image and at fixed counts, and bad input."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tests.helpers.exporting import check_compiled, check_exported
from tests.helpers.spvits import balance, decide, masked_pass, small, without_noise


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# Inference, image by image --------------------------------------------------------------------


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
    model = decide(small({"global_pool": pool}, package=package), keep=False, stage=0).train(
        training
    )
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
        return (
            torch.stack((sign, -sign), dim=1)[: len(votes), None, :].expand_as(votes),
            probability,
        )

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
    for fixed in (
        small(fixed_count=True, std=0.3),
        small(fixed_count=True, std=0.3, stochastic=True),
    ):
        kept = [fixed.trace(images)[1].layers[0].role for _ in range(2)]
        assert torch.equal(*kept) != fixed.strategy.stochastic


# Fixed counts ---------------------------------------------------------------------------------


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
    model, compared = small(targets=(0.99, 0.98)), 0
    for image in images:
        trace = model.trace(image[None])[1]
        packages = (
            torch.tensor([(layer.role == Role.CLUSTERED).any() for layer in trace.layers])
            .cumsum(0)
            .tolist()
        )
        patches = [
            trace.token_counts[layer.index].item() - n
            for layer, n in zip(trace.layers, packages, strict=True)
        ]
        assert patches[-1] < 16
        if not all(patches):
            continue  # a fixed count is at least one
        fixed = tdm.attach(
            model.vit,
            tdm.SPViT(layers=(1, 3), targets=[(n + 0.5) / 16 for n in patches], fixed_count=True),
        ).eval()
        fixed.strategy.load_state_dict(model.strategy.state_dict())
        torch.testing.assert_close(fixed(image[None]), model(image[None]), atol=1e-5, rtol=1e-5)
        compared += 1
    assert compared


@torch.no_grad()
def test_a_target_of_1_is_the_plain_model(images):
    model = small(fixed_count=True, targets=(1.0, 1.0))
    assert torch.equal(model.run(images).logits, model.vit(images))
    torch.testing.assert_close(model(images), model.vit(images))
    assert model.trace(images)[1].layers == []
    later = small(fixed_count=True, targets=(1.0, 0.5))
    assert later.trace(images)[1].token_counts == [16, 16, 16, 9, 9, 9]


@pytest.mark.parametrize("merger", [None, tdm.TokenMerger()], ids=["package", "merger"])
@torch.no_grad()
def test_fixed_counts_compile_and_export(images, merger, tmp_path):
    model = small({"depth": 4}, fixed_count=True, merger=merger)
    check_compiled(model, images)
    check_exported(model, images, None if merger else tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"fixed_count": True}, {"fixed_count": True, "merger": tdm.TokenMerger()}],
    ids=str,
)
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
        torch.testing.assert_close(
            maps[-1][image], output.features[image, 1:][last[image]], atol=1e-5, rtol=1e-4
        )


def test_positions_follow_the_tokens(images):
    """In a model with rotary positions a package stands where the best of its patches stood."""
    shape = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 5,
    }
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
    layer, position = trace.layers[0], placed[1].positions.index
    for image in range(4):
        kept = layer.role[image] == Role.KEPT
        assert (
            position[image][layer.assignment[image][kept]].tolist()
            == kept.nonzero().flatten().tolist()
        )
        if not kept.all():
            package = layer.assignment[image][~kept][0]
            assert (
                position[image][package]
                == layer.importance[image].masked_fill(kept, -torch.inf).argmax()
            )
    assert (layer.role == Role.CLUSTERED).any()


# Bad input ------------------------------------------------------------------------------------


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
        ({"merger": "yes", "fixed_count": True}, TypeError, "must be a Merger such as"),
        (
            {"merger": tdm.TokenMerger(features="keys"), "fixed_count": True},
            ValueError,
            "merges before a block",
        ),
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
            {
                "targets": (0.4, 0.3),
                "fixed_count": True,
                "merger": tdm.TokenMerger(attentive_ratio=1.0),
            },
            "no feasible split of 16 tokens into 6",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_comes_back_from_plain_values():
    strategy = tdm.SPViT(
        layers=(2, 4),
        fixed_count=True,
        merger=tdm.TokenMerger(),
        package="mean",
        shared_heads=False,
    )
    again = tdm.Strategy.from_config(strategy.config())
    assert type(again) is tdm.SPViT
    assert again.config() == strategy.config()
    assert not again.adaptive
