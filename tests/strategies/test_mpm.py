"""MPM: against the official code, its arithmetic, its batches and its limits."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.ops import unmerge
from tests.helpers.vits import lively
from tests.vit.test_families import MODELS, made

CASES = ("mpm_a", "mpm_b", "mpm_c")


def small(**kwargs):
    torch.manual_seed(2)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return lively(VisionTransformer(**{**shape, "num_classes": 5, **kwargs}).eval())


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_official_numbers(official, golden, case):
    layers = golden(case)[0]["method"]["mpm_layers"]
    _, tensors, model = official(case, tdm.MPM(layers))
    output = model.run(tensors["input"].float(), trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    found = output.trace.layers
    assert [layer.index for layer in found] == layers
    for layer, groups, counts in zip(
        found, tensors["groups"], tensors["token_counts"], strict=True
    ):
        assert torch.equal(layer.assignment, groups)
        assert torch.equal(output.trace.token_counts[layer.index], counts)
    prefix = model.vit.num_prefix_tokens
    dense = unmerge(output.features[:, prefix:], found[-1].assignment)
    restored = torch.cat((output.features[:, :prefix], dense), dim=1)
    torch.testing.assert_close(restored, tensors["features"], atol=1e-4, rtol=0)


class Weighted(tdm.MPM):
    """Not the method: a token attracts attention for all its patches."""

    def requires(self):
        return tdm.Requirements(sizes=True)

    def before_block(self, index, tokens):
        tokens = super().before_block(index, tokens)
        if index not in self.layers:
            return tokens
        size = tokens.size  # padding stands for nothing, so it still attracts next to none
        return tokens.replace(size=size.clamp(min=1e-30)).with_size_bias().replace(size=size)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_another_variant_is_told_apart(official, golden, case):
    layers = golden(case)[0]["method"]["mpm_layers"]
    for wrong in (Weighted(layers), tdm.MPM(layers[:-1])):
        _, tensors, model = official(case, wrong)
        assert (model(tensors["input"].float()) - tensors["logits"]).abs().max() > 3e-3


@pytest.mark.parametrize("pooling", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
@torch.no_grad()
def test_a_merged_token_is_the_mean_of_two(pooling):
    """Against plain loops, where blocks change nothing."""
    vit = small(**pooling)
    for block in vit.blocks:
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
        block.attn.proj.bias.zero_()
        block.mlp.fc2.bias.zero_()
    vit.norm = torch.nn.Identity()
    images, prefix = torch.randn(2, 3, 32, 32), vit.num_prefix_tokens
    entering = vit.forward_features(images)[:, prefix:]
    output = tdm.attach(vit, tdm.MPM((1, 3))).run(images, trace=True)
    for image in range(2):
        tokens = [(row, {patch}) for patch, row in enumerate(entering[image])]
        for _ in range(2):
            unit = torch.nn.functional.normalize(torch.stack([row for row, _ in tokens]), dim=1)
            similarity = (unit @ unit.T).fill_diagonal_(-2)
            best = similarity.argmax(dim=1).tolist()
            tokens = [
                ((row + tokens[best[i]][0]) / 2, held | tokens[best[i]][1])
                if best[best[i]] == i
                else (row, held)
                for i, (row, held) in enumerate(tokens)
                if best[best[i]] != i or best[i] > i
            ]
        for slot, (row, held) in enumerate(tokens):
            torch.testing.assert_close(output.features[image, prefix + slot], row)
            for patch in held:
                assert output.trace.layers[-1].assignment[image, patch] == slot
        assert output.trace.token_counts[-1][image] == len(tokens)
        assert output.features[image, prefix + len(tokens) :].eq(0).all()


@torch.no_grad()
def test_no_blocks_is_the_plain_model(images):
    model = tdm.attach(small(), tdm.MPM(()))
    assert torch.equal(model.run(images).logits, model.vit(images))
    torch.testing.assert_close(model(images), model.vit(images))


@pytest.mark.parametrize(
    "pooling",
    [{}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "map"}, {"reg_tokens": 2}],
    ids=str,
)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(pooling, images):
    model = tdm.attach(small(**pooling), tdm.MPM((0, 1, 2)))
    together, trace = model.trace(images)
    assert len(set(trace.token_counts[-1].tolist())) > 1
    for i in range(3):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])
            assert torch.equal(layer.role[i], single.role[0])


@torch.no_grad()
def test_what_the_trace_says(images):
    model = tdm.attach(small(), tdm.MPM((1, 2)))
    _, trace = model.trace(images)
    for layer in trace.layers:
        for image in range(3):
            held = layer.assignment[image].bincount()
            assert len(held) == trace.token_counts[layer.index][image]
            assert held.min() >= 1
            assert set(layer.role[image].tolist()) == {Role.KEPT, Role.MATCHED}
    first = trace.layers[0]
    alone = first.assignment[0].bincount()[first.assignment[0]] == 1
    assert torch.equal(first.role[0] == Role.KEPT, alone)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_families(name):
    """Registers, rotary and relative positions, pools: all of them, image by image."""
    vit = made(name)
    model, images = tdm.attach(vit, tdm.MPM((1, 2))), torch.randn(2, 3, 32, 32)
    together, trace = model.trace(images)
    assert together.isfinite().all()
    assert all(8 <= count < 16 for count in trace.token_counts[1].tolist())
    torch.testing.assert_close(model(images[1:])[0], together[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("patches", [1, 2])
@torch.no_grad()
def test_few_patches(patches):
    vit = small(img_size=(4, 4 * patches), depth=3)
    logits, trace = tdm.attach(vit, tdm.MPM((0, 2))).trace(torch.randn(2, 3, 4, 4 * patches))
    assert [count.tolist() for count in trace.token_counts] == [[1, 1]] * 3
    assert logits.isfinite().all()


@torch.no_grad()
def test_an_image_that_is_not_finite_spoils_no_other(images):
    model = tdm.attach(small(), tdm.MPM((1,)))
    clean = model(images)
    images[0] = float("nan")
    spoilt = model(images)
    assert spoilt[0].isnan().all()
    torch.testing.assert_close(spoilt[1:], clean[1:], atol=1e-5, rtol=1e-5)


def test_multiply_accumulates_are_counted_on_images(images):
    model = tdm.attach(small(), tdm.MPM((1,)))
    report = tdm.flops.mac_report(model, images=images)
    assert 0 < report.reduction < 0.5
    assert 32 <= report.blocks[1].tokens < 64
    with pytest.raises(ValueError, match="another number of tokens for each image"):
        tdm.flops.count_macs(model)


def test_there_is_nothing_to_solve_for():
    vit = small()
    with pytest.raises(TypeError, match="MPM has no keep rate to solve for"):
        tdm.solve_keep_rate(vit, tdm.MPM((1,)), gmacs=0.001)
    with pytest.raises(TypeError, match="MPM has no keep rate or other setting"):
        tdm.budget.at_budget(vit, tdm.MPM((1,)), gmacs=0.001)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ((3, 3), ValueError, "must not repeat"),
        ((-1,), ValueError, "cannot be negative"),
        ((1.0,), TypeError, "must hold integers"),
        ("2", TypeError, "must be a sequence"),
    ],
)
def test_bad_layers(layers, error, message):
    with pytest.raises(error, match=message):
        tdm.MPM(layers)


def test_blocks_that_the_model_lacks():
    with pytest.raises(ValueError, match=r"layers \[5\] do not exist: the model has 4 blocks"):
        tdm.attach(small(), tdm.MPM())
