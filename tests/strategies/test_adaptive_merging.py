"""MaMe, which no code is published of, and MPM: against plain loops, and batch by batch."""

import pytest
import timm
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.ops import spread_weights
from tests.helpers.vits import lively

METHODS = {"mpm": lambda: tdm.MPM((1, 2)), "mame": lambda: tdm.MaMe(0.6, (0, 1, 2))}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def small(**kwargs):
    torch.manual_seed(3)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 4}
    return lively(timm.create_model("deit_tiny_patch16_224", **{**shape, **kwargs}).eval())


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


def plain_pairs(x):
    """One image's tokens after merging, and who took each one in."""
    unit, n = F.normalize(x, dim=-1), len(x)
    best = [max((j for j in range(n) if j != i), key=lambda j: unit[i] @ unit[j]) for i in range(n)]
    into = [min(i, best[i]) if best[best[i]] == i else i for i in range(n)]
    kept = sorted(set(into))
    return torch.stack([x[[i for i in range(n) if into[i] == k]].mean(0) for k in kept]), into


def plain_spread(x, threshold):
    """The same for MaMe."""
    unit, n = F.normalize(x, dim=-1), len(x)
    targets, sources = list(range(0, n, 2)), list(range(1, n, 2))
    given, into = {t: [(1.0, t)] for t in targets}, list(range(n))
    for s in sources:
        weights = {t: max(0.0, (unit[s] @ unit[t]).item() - threshold) for t in targets}
        total = sum(weights.values())
        if total == 0:
            continue
        weights = {t: w / total for t, w in weights.items() if w > 0}
        mean = sum(weights.values()) / len(weights)
        above = {t: w - mean for t, w in weights.items() if w > mean}
        weights = above if sum(above.values()) > 1e-6 else weights
        for t, w in weights.items():
            given[t].append((w / sum(weights.values()), s))
        into[s] = max(weights, key=weights.get)
    kept = [i for i in range(n) if into[i] == i]
    rows = [
        sum(w * x[j] for w, j in given[i]) / sum(w for w, _ in given[i]) if i in given else x[i]
        for i in kept
    ]
    return torch.stack(rows), into


@torch.no_grad()
def test_a_pass_against_plain_loops(images):
    """Merging in the first block alone, image by image: what is left enters the rest of the ViT."""
    vit = small()
    for make, plain, before in (
        (lambda: tdm.MPM((0,)), plain_pairs, True),
        (lambda: tdm.MaMe(0.3, (0,)), lambda x: plain_spread(x, 0.3), False),
    ):
        logits, trace = tdm.attach(vit, make()).trace(images)
        for number, image in enumerate(images):
            x = vit._pos_embed(vit.patch_embed(image.unsqueeze(0)))
            first = vit.blocks[0]
            if not before:
                x = x + first.attn(first.norm1(x))
            merged, into = plain(x[0, 1:])
            x = torch.cat((x[:, :1], merged.unsqueeze(0)), dim=1)
            x = first(x) if before else x + first.mlp(first.norm2(x))
            for block in vit.blocks[1:]:
                x = block(x)
            expected = vit.forward_head(vit.norm(x))[0]
            torch.testing.assert_close(logits[number], expected, atol=1e-5, rtol=1e-4)
            held = trace.layers[0].assignment[number].tolist()
            kept = sorted(set(into))
            assert held == [kept.index(i) for i in into]
            assert 0 < len(into) - len(kept) <= 32
            assert (trace.layers[0].role[number] == Role.MATCHED).any()


@every_method
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images, make):
    model = tdm.attach(small(), make())
    together, trace = model.trace(images)
    counts = [count.tolist() for count in trace.token_counts]
    assert len(set(counts[-1])) > 1
    for i in range(3):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])


@every_method
@pytest.mark.parametrize("pool", [{"global_pool": "avg", "class_token": False}, {"reg_tokens": 2}])
@torch.no_grad()
def test_other_models_and_equal_tokens(make, pool):
    model = tdm.attach(small(**pool), make())
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    model.vit.pos_embed.zero_()
    output = model.run(torch.zeros(2, 3, 32, 32), trace=True)
    assert output.logits.isfinite().all()
    if output.size is not None:
        torch.testing.assert_close(output.size.sum(1), torch.full((2,), 64.0))


@every_method
def test_trains_and_comes_back_from_plain_values(images, make):
    model = tdm.attach(small(), make()).train()
    model(images).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    again = tdm.Strategy.from_config(make().config())
    assert again.config() == make().config()
    assert again.search_space(12, 196) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tdm.MaMe(1.5), "threshold is a cosine"),
        (lambda: tdm.attach(small(), tdm.MPM((4,))), "do not exist"),
        (lambda: tdm.attach(small(), tdm.MaMe()), "do not exist"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_one_and_two_patches():
    assert spread_weights(torch.full((1, 1, 1), 0.9), 0.8).tolist() == [[[1.0]]]
    for make in METHODS.values():
        vit = small(img_size=4)
        images = torch.ones(1, 3, 4, 4)
        torch.testing.assert_close(tdm.attach(vit, make())(images), vit(images))
