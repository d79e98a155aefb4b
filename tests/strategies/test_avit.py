"""A-ViT at inference: against one image and token at a time, with halted tokens really gone, and
its laws.
"""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from tdm_lightning.callbacks import DiversityMonitor
from timm.layers import RmsNorm
from torch.utils.data import DataLoader

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tests.helpers.avits import close, make_vit, masking, small, spread
from tests.helpers.trainers import QUIET


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# One image and token at a time ----------------------------------------------------------------


def slowly(vit, image, strategy, waits_for=None):
    """The definition, for one image of 3×H×W: features before the final norm, blocks run and
    remainder of every token.

    Halted tokens are left out of what the blocks get. The whole image ends with the tokens in
    ``waits_for``.
    """
    states = vit._pos_embed(vit.patch_embed(image[None]))[0]
    alive, spent = list(range(len(states))), [0.0] * len(states)
    sums, blocks, rest = torch.zeros_like(states), [0] * len(states), [0.0] * len(states)
    for index, block in enumerate(vit.blocks):
        out = block(states[alive][None])[0]
        last, going = index == len(vit.blocks) - 1, []
        for token, state in zip(alive, out, strict=True):
            score = torch.sigmoid(strategy.gate_scale * state[0] - strategy.gate_center).item()
            states[token], blocks[token] = state, blocks[token] + 1
            if not last and spent[token] + score < 1 - strategy.eps:
                going.append((token, score))
        ended = waits_for is not None and not any(token in waits_for for token, _ in going)
        going = [] if ended else going
        for token in set(alive) - {token for token, _ in going}:
            rest[token] = 1 - spent[token]
            sums[token] += rest[token] * states[token]
        for token, score in going:
            sums[token] += score * states[token]
            spent[token] += score
        alive = [token for token, _ in going]
        if not alive:
            break
    return sums, torch.tensor(blocks), torch.tensor(rest)


@given(
    scale=st.sampled_from([0.5, 1.0, 3.0]),
    center=st.floats(-2, 8),
    eps=st.sampled_from([0.01, 0.2]),
)
@torch.no_grad()
def test_both_forms_follow_the_definition(scale, center, eps):
    model = small(gate_scale=scale, gate_center=center, eps=eps)
    torch.manual_seed(4)
    images = torch.randn(3, 3, 32, 32)
    masked = masking(model).run(images, trace=True)
    removed = model.run(images, trace=True)
    for i, image in enumerate(images):
        sums, blocks, rest = slowly(model.vit, image, model.strategy)
        close(masked.features[i], model.vit.norm(sums), 1e-4)
        assert torch.equal(masked.state.blocks[i].long(), blocks)
        close(masked.state.ponder[i], blocks + rest, 1e-5)
        assert [count[i].item() for count in masked.trace.token_counts] == [
            (blocks[1:] > at).sum() for at in range(6)
        ]
        sums, blocks, _ = slowly(model.vit, image, model.strategy, waits_for={0})
        close(removed.features[i], model.vit.norm(sums), 1e-4)
        assert [count[i].item() for count in removed.trace.token_counts] == [
            (blocks[1:] > at).sum() for at in range(6)
        ]
    close(removed.logits, masked.logits, 1e-5)


MODELS = {
    "class token": make_vit,
    "registers": lambda: make_vit(reg_tokens=3),
    "layer scale": lambda: make_vit(init_values=0.5),
    "average pooling": lambda: make_vit(global_pool="avg"),
    "no class token": lambda: make_vit(global_pool="avg", class_token=False),
    "attention pooling": lambda: make_vit(global_pool="map"),
    "another norm": lambda: make_vit(qk_norm=True, norm_layer=RmsNorm),
    "distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "rotary": lambda: timm_model("eva02_tiny_patch14_224", patch_size=8),
    "relative bias": lambda: timm_model("beit_base_patch16_224"),
}
CENTERS = {
    "registers": 4.0,
    "no class token": 3.0,
    "another norm": 9.0,
    "distilled": 3.0,
    "rotary": 4.0,
    "relative bias": 4.0,
}


def timm_model(name, **kwargs):
    small = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 5,
    }
    return spread(timm.create_model(name, **{**small, **kwargs}))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_removal_equals_masking(name, images):
    """On every kind of model; images differ in length, and where the head reads leading tokens some
    leave early.
    """
    model = small(MODELS[name](), gate_center=CENTERS.get(name, 2.0))
    logits, removed = model.trace(images)
    expected, masked = masking(model).trace(images)
    close(logits, expected, 1e-5)
    assert (logits - model.vit(images)).abs().amax(1).min() > 1e-3
    found, kept = torch.stack(removed.token_counts), torch.stack(masked.token_counts)
    here = found > 0
    assert torch.equal(found[here], kept[here])
    assert (found.diff(dim=0) <= 0).all()
    assert len(found.unique()) > 3
    assert found[-1].sum() < 4 * 16


# What is computed -----------------------------------------------------------------------------


@torch.no_grad()
def test_fewer_rows_enter_the_matmuls(images):
    model = small()
    rows = {index: [] for index in range(6)}
    for index, block in enumerate(model.vit.blocks):
        for layer in (block.attn.qkv, block.mlp.fc1):
            layer.register_forward_pre_hook(
                lambda layer, inputs, index=index: rows[index].append(inputs[0].shape[:2])
            )
    model(images)
    blocks = [slowly(model.vit, image, model.strategy, waits_for={0})[1] for image in images]
    for index, shapes in rows.items():
        present = [run for run in blocks if run[0] > index]
        longest = max(1 + int((run[1:] > index).sum()) for run in present)
        assert shapes[:2] == [(len(present), longest)] * 2
    assert [len(run) for run in (blocks, [r for r in blocks if r[0] > 5])] == [4, 2]


@torch.no_grad()
def test_multiply_accumulates_are_those_of_the_rows(images):
    model = small()
    image = images[0]
    report = tdm.flops.mac_report(model, images=image[None])
    _, blocks, _ = slowly(model.vit, image, model.strategy, waits_for={0})
    for index, block in enumerate(report.blocks):
        n = int((blocks > index).sum())
        assert block.tokens == max(0, n - 1)
        assert block.attention == 4 * n * 32**2 + 2 * n**2 * 32
        assert block.mlp == 8 * n * 32**2
    assert report.backbone < report.plain
    assert report.strategy == 0
    assert tdm.flops.count_macs(model, images=images[:1]) == report.backbone
    # Together images cost more than alone, by the padding only.
    alone = [tdm.flops.mac_report(model, images=image[None]).backbone for image in images]
    assert sum(alone) / 4 <= tdm.flops.mac_report(model, images=images).backbone < report.plain
    with pytest.raises(ValueError, match="another number of tokens for each image"):
        tdm.flops.mac_report(model)


@torch.no_grad()
def test_images_that_all_leave_at_once_end_the_pass(images):
    model = small(gate_center=-100.0)
    calls = []
    for index, block in enumerate(model.vit.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    logits, trace = model.trace(images)
    assert calls == [0]
    assert [count.tolist() for count in trace.token_counts] == [[16] * 4] + [[0] * 4] * 5
    first = model.vit.blocks[0](model.vit._pos_embed(model.vit.patch_embed(images)))
    close(logits, model.vit.head(model.vit.norm(first)[:, 0]), 1e-5)
    assert tdm.flops.mac_report(model, images=images).blocks[1].mlp == 0
    assert model.forward_intermediates(images, indices=[3], intermediates_only=True)[0].shape == (
        4,
        32,
        4,
        4,
    )
    assert len(small(gate_center=-100.0).trace(images[:1])[1].layers) == 1


@torch.no_grad()
def test_without_halting_it_is_the_plain_model(images):
    model = small(gate_center=1e4)
    close(model(images), model.vit(images), 1e-6)
    close(masking(model)(images), model.vit(images), 1e-6)
    close(model.forward_features(images), model.vit.forward_features(images), 1e-5)
    assert model.trace(images)[1].layers == []


# Laws -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images):
    model = small()
    together, trace = model.trace(images)
    order = torch.tensor([2, 0, 3, 1])
    close(model(images[order]), together[order], 1e-5)
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1])
        close(alone[0], together[i], 1e-5)
        assert [count.item() for count in own.token_counts] == [
            count[i].item() for count in trace.token_counts
        ]
        fates = {layer.index: layer.assignment[i] for layer in trace.layers}
        for layer in own.layers:
            assert torch.equal(layer.assignment[0], fates[layer.index])


@torch.no_grad()
def test_the_trace_accounts_for_every_patch_of_every_image(images):
    model = small()
    _, trace = model.trace(images)
    assert [layer.index for layer in trace.layers] == [2, 3, 4, 5]
    runs = torch.stack(
        [slowly(model.vit, image, model.strategy, waits_for={0})[1][1:] for image in images]
    )
    for layer in trace.layers:
        kept = runs > layer.index
        assert torch.equal(layer.assignment, torch.where(kept, kept.cumsum(1) - 1, -1))
        assert torch.equal(layer.role == Role.KEPT, kept)
        assert torch.equal(layer.role == Role.DROPPED, ~kept)
        assert torch.equal(trace.token_counts[layer.index], kept.sum(1))
        assert len(layer.importance) == 4


@torch.no_grad()
def test_intermediate_maps_hold_every_image(images):
    model = small()
    states = [{} for _ in images]
    for image, seen in zip(images, states, strict=True):
        handles = [
            point.register_forward_hook(
                lambda point, inputs, x, at=at, seen=seen: seen.update({at: x})
            )
            for at, point in enumerate(model.hook_points)
        ]
        model(image[None])
        for handle in handles:
            handle.remove()
    final, maps = model.forward_intermediates(
        images, indices=[2, 5], output_fmt="NLC", return_prefix_tokens=True
    )
    assert final.shape == (4, 17, 32)
    runs = torch.stack(
        [slowly(model.vit, image, model.strategy, waits_for={0})[1] for image in images]
    )
    for at, (dense, prefix) in zip([2, 5], maps, strict=True):
        assert dense.shape == (4, 16, 32)
        assert torch.equal(dense.abs().sum(-1) > 0, runs[:, 1:] > at)
        for i in range(4):
            if runs[i, 0] > at:
                close(dense[i][runs[i, 1:] > at], states[i][at][0, 1:], 1e-5)
                close(prefix[i], states[i][at][0, :1], 1e-5)
            else:
                assert not len(states[i][at])
                assert not prefix[i].any()


def test_a_pass_leaves_nothing_behind(images):
    model = small()
    before = {name: str(value) for name, value in vars(model.strategy).items()}
    first = model(images)
    masking(model).run(images)
    model.trace(images[:1])
    assert torch.equal(model(images), first)
    assert {name: str(value) for name, value in vars(model.strategy).items()} == before
    assert list(model.strategy.state_dict()) == []
    other = tdm.attach(make_vit(depth=2), model.strategy)
    assert other(images).shape == (4, 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("center", [2.5, -100.0])
def test_half_precision_stays_finite(images, dtype, center):
    model = small(gate_center=center).to(dtype)
    output = model.run(images.to(dtype))
    assert output.logits.isfinite().all()
    assert output.features.dtype == dtype
    assert masking(model)(images.to(dtype)).isfinite().all()


# Around it ------------------------------------------------------------------------------------


@torch.no_grad()
def test_pictures_of_images_that_leave(images):
    from tdm_lightning.visualize import panels

    model = small()
    drawn = panels(model, images[0])
    trace = model.trace(images[:1])[1]
    assert (trace.layers[-1].assignment < 0).all()
    assert [f"block {layer.index + 1}" for layer in trace.layers] == [
        name for name in drawn if name.startswith("block")
    ]


def test_diversity_of_images_that_have_left(images, tmp_path):
    """An image without tokens counts as one without diversity, also where no image is left."""

    class Module(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def validation_step(self, batch, index):
            self.model(batch)

    def scores(center):
        monitor = DiversityMonitor()
        trainer = Trainer(
            **QUIET,
            callbacks=[monitor],
            default_root_dir=tmp_path,
        )
        trainer.validate(
            Module(small(gate_center=center)), DataLoader(images, batch_size=4), verbose=False
        )
        return monitor.scores["val"]

    assert scores(-100.0)[1:] == [0] * 5
    assert scores(-100.0)[0] > 0
