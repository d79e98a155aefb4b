"""PS-ViT: static masks, attention for the kept rows alone, masks that travel with the weights."""

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.metrics.recorder import DiversityRecorder
from tdm_lightning.strategies.psvit import evenly_distributed_order
from tdm_lightning.visualize import panels
from tests.helpers.exporting import check_exported

COUNTS = (14, 14, 9, 4, 4, 0)


def make_vit(distilled=False, **kwargs):
    """16 patches, 6 blocks, peaked attention."""
    torch.manual_seed(1)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 5,
        **kwargs,
    }
    vit = (VisionTransformerDistilled if distilled else VisionTransformer)(**arguments).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
                parameter.normal_(std=0.25)
    return vit


def random_masks(counts, patches=16, seed=0):
    """Nested masks at positions that mean nothing."""
    rank = torch.randperm(patches, generator=torch.Generator().manual_seed(seed)).argsort()
    return rank < torch.tensor(counts)[:, None]


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


# Arithmetic -----------------------------------------------------------------------------------


def masked_blocks(vit, images, masks):
    """The method spelled out on all tokens: rows outside a mask stay as they are, keys outside the
    mask before are hidden.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    always = torch.ones(vit.num_prefix_tokens, dtype=torch.bool)
    before = torch.ones(x.shape[1], dtype=torch.bool)
    for block, mask in zip(vit.blocks, masks, strict=True):
        kept = torch.cat((always, mask))
        attn = block.attn
        q, k, v = (
            attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        logits = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).masked_fill(
            ~before, -torch.inf
        )
        y = x + block.ls1(attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        y = y + block.ls2(block.mlp(block.norm2(y)))
        x = torch.where(kept[:, None], y, x)
        before = kept
    return vit.norm(x)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"distilled": True},
        {"reg_tokens": 3},
        {"qk_norm": True, "init_values": 0.5},
        {"global_pool": "avg", "class_token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("counts", [COUNTS, (16, 16, 16, 16, 16, 1), (5,) * 6], ids=str)
@torch.no_grad()
def test_equals_masking_on_all_tokens(images, kwargs, counts):
    vit = make_vit(**kwargs)
    if kwargs.get("global_pool"):
        counts = (*counts[:-1], max(counts[-1], 1))
    masks = random_masks(counts)
    model = tdm.attach(vit, tdm.PSViT(masks=masks))
    output = model.run(images, trace=True)
    dense, prefix = masked_blocks(vit, images, masks), vit.num_prefix_tokens
    torch.testing.assert_close(output.features[:, :prefix], dense[:, :prefix], atol=1e-5, rtol=1e-4)
    final = output.trace.layers[-1].assignment
    assert torch.equal(final >= 0, masks[-1].expand(2, -1))
    patches = output.features[:, prefix:]
    for position in masks[-1].nonzero().flatten().tolist():
        torch.testing.assert_close(
            patches[0, final[0, position]], dense[0, prefix + position], atol=1e-5, rtol=1e-4
        )
    survivors = torch.cat((dense[:, :prefix], dense[:, prefix:][:, masks[-1]]), dim=1)
    torch.testing.assert_close(output.logits, vit.forward_head(survivors), atol=1e-5, rtol=1e-4)


@given(counts=st.lists(st.integers(0, 16), min_size=6, max_size=6), seed=st.integers(0, 99))
@torch.no_grad()
def test_counts_and_the_fate_of_every_patch(counts, seed):
    counts = sorted(counts, reverse=True)
    masks = random_masks(counts, seed=seed)
    _, trace = tdm.attach(make_vit(), tdm.PSViT(masks=masks)).trace(torch.randn(1, 3, 32, 32))
    assert trace.token_counts == counts
    assert [layer.index for layer in trace.layers] == [
        b for b in range(6) if counts[b] < [16, *counts][b]
    ]
    for layer in trace.layers:
        assert torch.equal(layer.assignment[0] >= 0, masks[layer.index])
        assert torch.equal(layer.role[0] == Role.KEPT, masks[layer.index])
        assert sorted(layer.assignment[0][masks[layer.index]].tolist()) == list(
            range(counts[layer.index])
        )


@torch.no_grad()
def test_keep_rate_1_is_the_plain_model(images):
    vit = make_vit()
    model = tdm.attach(vit, tdm.PSViT(1.0))
    logits, trace = model.trace(images)
    assert torch.equal(logits, vit(images))
    assert trace.token_counts == [16] * 6
    assert trace.layers == []


@torch.no_grad()
def test_the_last_block_needs_the_class_token_alone(images):
    vit = make_vit()
    torch.testing.assert_close(
        tdm.attach(vit, tdm.PSViT(counts=[16] * 5 + [0]))(images), vit(images), atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images):
    model = tdm.attach(make_vit(), tdm.PSViT(counts=COUNTS))
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_attention_is_computed_for_kept_rows_only(images, monkeypatch):
    model = tdm.attach(make_vit(), tdm.PSViT(counts=COUNTS))
    shapes, original = [], F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        shapes.append((q.shape[-2], k.shape[-2]))
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(images)
    assert shapes == [
        (count + 1, before + 1) for count, before in zip(COUNTS, (16, *COUNTS), strict=False)
    ]


def expected_macs(counts, patches, width, classes, stem):
    """Queries and what follows for the rows that stay, keys and values for those that enter."""
    blocks = []
    for count, before in zip(counts, (patches, *counts), strict=False):
        q, k = count + 1, before + 1
        blocks.append((2 * q * width**2 + 2 * k * width**2 + 2 * q * k * width, 8 * q * width**2))
    return blocks, sum(map(sum, blocks)) + patches * width * stem + classes * width


def test_cost_is_exact():
    model = tdm.attach(make_vit(), tdm.PSViT(counts=COUNTS))
    blocks, total = expected_macs(COUNTS, 16, 32, 5, 3 * 8 * 8)
    report = tdm.flops.mac_report(model)
    assert [(block.attention, block.mlp) for block in report.blocks] == blocks
    assert [block.tokens for block in report.blocks] == list(COUNTS)
    assert report.strategy == 0
    assert tdm.flops.count_macs(model) == total


@pytest.mark.parametrize(
    ("size", "width", "rate", "published"),
    [("tiny", 192, 0.96, 0.93), ("small", 384, 0.91, 2.6), ("base", 768, 0.91, 9.8)],
)
def test_published_costs(size, width, rate, published):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{size}_patch16_224")
    strategy = tdm.PSViT(rate)
    model = tdm.attach(vit, strategy)
    assert (
        tdm.flops.count_macs(model)
        == expected_macs(strategy.token_counts, 196, width, 1000, 768)[1]
    )
    assert tdm.flops.count_macs(model) / 1e9 == pytest.approx(published, rel=0.02)
    assert strategy.token_counts[-1] == 0


# The placeholder ------------------------------------------------------------------------------


def test_placeholder_keeps_a_share_of_the_block_before():
    strategy = tdm.PSViT(0.7)
    assert strategy.schedule(6, 16) == (12, 9, 7, 5, 4, 0)
    assert strategy.schedule(6, 16, class_head=False) == (12, 9, 7, 5, 4, 3)
    assert tdm.PSViT(counts=COUNTS).schedule(6, 16) == COUNTS
    model = tdm.attach(make_vit(), strategy)
    assert model.strategy.token_counts == (12, 9, 7, 5, 4, 0)
    assert torch.equal(model.strategy.kept.sum(dim=1), torch.tensor(strategy.token_counts))
    assert tdm.PSViT().keep_rate == 0.91


@pytest.mark.parametrize("side", [4, 8, 13, 14, 16, 21])
def test_spread_order_is_even(side):
    """Every quarter of the grid gets about its share of the first patches."""
    order = evenly_distributed_order(side * side)
    assert sorted(order.tolist()) == list(range(side * side))
    rows, columns = order // side, order % side
    for count in (side * side // 8, side * side // 4, side * side // 2):
        for half in (rows < side // 2, columns < side // 2):
            share = half[:count].float().mean() - half.float().mean()
            assert share.abs() <= 1.5 / count**0.5 / 2


def test_a_budget_turns_the_keep_rate():
    vit = make_vit()
    plain = tdm.flops.count_macs(vit)
    rate = tdm.solve_keep_rate(vit, tdm.PSViT(), gmacs=0.6 * plain / 1e9)
    assert 0 < rate < 1
    assert tdm.flops.count_macs(tdm.attach(vit, tdm.PSViT(rate))) <= 0.6 * plain


# Masks in the state dict ----------------------------------------------------------------------


@torch.no_grad()
def test_masks_travel_with_the_weights(images):
    model = tdm.attach(make_vit(), tdm.PSViT(masks=random_masks(COUNTS)))
    state = model.state_dict()
    assert state["strategy.kept"].dtype == torch.bool
    assert not [name for name in state if name.startswith("strategy.") and name != "strategy.kept"]
    assert not list(model.strategy.parameters())
    other = tdm.attach(make_vit(), tdm.PSViT())
    assert not torch.allclose(other(images), model(images))
    other.load_state_dict(state)
    assert other.strategy.token_counts == COUNTS
    assert torch.equal(other(images), model(images))
    assert torch.equal(copy.deepcopy(other)(images), model(images))


def test_loading_masks_that_do_not_fit():
    model = tdm.attach(make_vit(), tdm.PSViT(counts=COUNTS))
    before = model.strategy.kept.clone()
    with pytest.raises(RuntimeError, match="not nested"):
        model.load_state_dict(model.state_dict() | {"strategy.kept": before.flip(0)})
    with pytest.raises(RuntimeError, match="size mismatch for strategy.kept"):
        model.load_state_dict(
            model.state_dict() | {"strategy.kept": torch.ones(6, 25, dtype=torch.bool)}
        )
    assert torch.equal(model.strategy.kept, before)
    assert model.strategy.token_counts == COUNTS


def test_arguments_as_plain_values():
    for strategy in (
        tdm.PSViT(0.8),
        tdm.PSViT(counts=COUNTS),
        tdm.PSViT(masks=random_masks(COUNTS)),
    ):
        again = tdm.Strategy.from_config(strategy.config())
        assert again.config() == strategy.config()
        assert torch.equal(
            tdm.attach(make_vit(), again).strategy.kept,
            tdm.attach(make_vit(), strategy).strategy.kept,
        )
    assert repr(again) == f"PSViT(token_counts={list(COUNTS)})"


def test_checkpoints_of_the_classifier(tmp_path, images):
    from lightning.pytorch import Trainer

    kwargs = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 5,
    }
    module = tdm.TokenReductionClassifier("deit_tiny_patch16_224", tdm.PSViT(), model_kwargs=kwargs)
    module.model.load_state_dict(
        tdm.attach(make_vit(), tdm.PSViT(masks=random_masks(COUNTS))).state_dict()
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = tdm.TokenReductionClassifier.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert again.model.strategy.token_counts == COUNTS
    with torch.no_grad():
        expected = module.eval()(images)
        assert torch.equal(again(images), expected)
        fresh = tdm.attach(make_vit(), tdm.PSViT())
        tdm.checkpoints.load_official(fresh, tmp_path / "model.ckpt")
        assert torch.equal(fresh(images), expected)
        # Weights alone fit any other model, and weights without masks fit PS-ViT.
        plain = make_vit()
        tdm.checkpoints.load_official(plain, tmp_path / "model.ckpt")
        assert tdm.checkpoints.load_official(fresh, plain.state_dict()).untouched == (
            "strategy.kept",
        )
    assert fresh.strategy.token_counts == COUNTS


@torch.no_grad()
def test_averaging_weights_with_buffers_keeps_the_masks(images):
    """Averages are taken of all buffers, where whole numbers would be rounded down."""
    model = tdm.attach(make_vit(), tdm.PSViT(masks=random_masks(COUNTS)))
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(5):
        mean.update_parameters(model)
    assert torch.equal(mean.module.strategy.kept, model.strategy.kept)
    torch.testing.assert_close(mean(images), model(images), atol=1e-6, rtol=1e-5)


# Laws of a fixed budget -----------------------------------------------------------------------


@pytest.fixture
def shallow():
    """Export takes its time with every block."""
    return tdm.attach(make_vit(depth=3), tdm.PSViT(masks=random_masks((9, 4, 0))))


@torch.no_grad()
def test_compiles_without_a_graph_break(shallow, images):
    eager = shallow(images)
    torch._dynamo.reset()
    compiled = torch.compile(shallow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), eager, atol=1e-5, rtol=1e-4)
    assert torch.equal(shallow(images), eager)


@torch.no_grad()
def test_exports_with_any_batch_size(shallow, images, tmp_path):
    check_exported(shallow, images, tmp_path / "m.onnx")


def test_trains_in_half_precision_with_finite_gradients(images):
    model = tdm.attach(make_vit(), tdm.PSViT(counts=COUNTS)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.half().eval()(images.half()).isfinite().all()


# Where no patch is left -----------------------------------------------------------------------


@torch.no_grad()
def test_dense_features_and_pictures_without_patches(images):
    model = tdm.attach(make_vit(), tdm.PSViT(masks=random_masks(COUNTS)))
    _, (early, last) = model.forward_intermediates(images, indices=[2, 5], output_fmt="NLC")
    assert torch.equal((early != 0).any(-1)[0], random_masks(COUNTS)[2])
    assert not last.any()
    with DiversityRecorder(model) as recorder:
        model(images)
    scores = recorder.compute()
    assert scores[-1] == 0
    assert all(score > 0 for score in scores[:-1])
    drawn = panels(model, images[0])
    assert list(drawn) == ["original", "reduced", "block 1", "block 3", "block 4", "block 6"]
    assert "diversity" in panels(model, images[0], layer=1)


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_rate": 0}, ValueError, "keep_rate"),
        ({"counts": "12"}, TypeError, "counts"),
        ({"counts": [4, 2.5]}, TypeError, "integers"),
        ({"counts": [4, -1]}, ValueError, "negative"),
        ({"counts": [4, 2, 3]}, ValueError, "must not grow.*block 2 has 3 after 2"),
        ({"counts": [1], "masks": [[1]]}, ValueError, "one of them"),
        ({"masks": 3}, TypeError, "zeros and ones"),
        ({"masks": [[1, 0], [1]]}, ValueError, "lengths"),
        ({"masks": [[1, 2]]}, ValueError, "other values"),
        (
            {"masks": [[1, 1, 0], [1, 0, 1]]},
            ValueError,
            "block 1 keeps patch 2, which block 0 did not",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.PSViT(**arguments)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (tdm.PSViT(counts=[16, 0]), "one number per block, 6 here"),
        (tdm.PSViT(counts=[17] + [0] * 5), "16 patches, got 17"),
        (tdm.PSViT(masks=random_masks(COUNTS, 25)), "do not fit.*16 patches.*tdm slim"),
        (tdm.PSViT(masks=random_masks(COUNTS[:4])), "masks of 4 blocks"),
    ],
)
def test_masks_that_do_not_fit_the_model(strategy, message):
    with pytest.raises(ValueError, match=message):
        tdm.attach(make_vit(), strategy)


def test_another_image_size_at_run_time():
    vit = make_vit(dynamic_img_size=True)
    model = tdm.attach(vit, tdm.PSViT(counts=COUNTS))
    with pytest.raises(ValueError, match="masks are for 16 patches and these images have 36"):
        model(torch.randn(1, 3, 48, 48))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"block_fn": ResPostBlock},
        {"block_fn": ParallelScalingBlock},
        {"block_fn": ParallelThingsBlock},
        {"attn_layer": "diff"},
    ],
)
def test_blocks_that_cannot_compute_chosen_rows(kwargs):
    vit = make_vit(**kwargs)
    assert kwargs != {"attn_layer": "diff"} or isinstance(vit.blocks[0].attn, DiffAttention)
    with pytest.raises(
        TypeError, match="with PSViT: chosen rows.*plain blocks, or another strategy"
    ):
        tdm.attach(vit, tdm.PSViT())


def test_models_that_need_their_patches():
    pooled = make_vit(global_pool="avg")
    assert tdm.attach(pooled, tdm.PSViT(0.5)).strategy.token_counts[-1] == 1
    with pytest.raises(ValueError, match="reads its patches"):
        tdm.attach(pooled, tdm.PSViT(counts=COUNTS))
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        tdm.attach(make_vit(patch_drop_rate=0.5), tdm.PSViT())


def test_masks_belong_to_one_model_and_are_not_annealed(images):
    strategy = tdm.PSViT()
    model = tdm.attach(make_vit(), strategy)
    with pytest.raises(ValueError, match="attached already"):
        tdm.attach(make_vit(), strategy)
    strategy.current_keep_rate = 0.9
    with pytest.raises(ValueError, match="leave KeepRateWarmup out"):
        model(images)
