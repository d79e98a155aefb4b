"""Whole models in both forms: equal decisions and logits, where kernels run in the interpreter."""

import warnings

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tests.helpers.vits import lively

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("error:.*kernel.*:RuntimeWarning")
STRATEGIES = {
    "tdm": lambda: tdm.TDM(0.6, (1, 2)),
    "tdm by keys": lambda: tdm.TDM(0.6, (1, 2), merger=tdm.TokenMerger(features="keys")),
    "evit-merger": lambda: tdm.EViT(0.6, (1, 2), merger=tdm.TokenMerger()),
    "ward": lambda: tdm.WardTDM(0.6, (0, 2)),
    "ward protected": lambda: tdm.WardTDM(0.7, (0, 2), protect=0.1),
    "ward exact": lambda: tdm.WardTDM(0.7, (1,), rounds=None),
    "tome": lambda: tdm.ToMe(5),
    "tofu": lambda: tdm.ToFu(5),
    "evit": lambda: tdm.EViT(0.6, (1, 2)),
}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return lively(VisionTransformer(**shape, num_classes=5).eval())


@pytest.mark.parametrize("name", STRATEGIES)
def test_both_forms_decide_alike(vit, name):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = tdm.attach(vit, STRATEGIES[name]()).eval()
    found = {}
    for form in ("torch", "triton"):
        with tdm.kernels.use(form), torch.no_grad():
            found[form] = model.trace(images)
    (logits, trace), (others, again) = found["torch"], found["triton"]
    for mine, theirs in zip(trace.layers, again.layers, strict=True):
        assert torch.equal(mine.assignment, theirs.assignment)
        assert torch.equal(mine.role, theirs.role)
    torch.testing.assert_close(others, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tdm", "ward", "tome", "evit"])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(vit, name):
    images = torch.randn(3, 3, 32, 32)
    model = tdm.attach(vit, STRATEGIES[name]()).eval()
    with tdm.kernels.use("triton"):
        together, trace = model.trace(images)
        alone, own = model.trace(images[1:2])
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)
    for layer, single in zip(trace.layers, own.layers, strict=True):
        assert torch.equal(layer.assignment[1], single.assignment[0])


@pytest.mark.parametrize("name", ["tdm", "tdm by keys", "evit", "evit-merger"])
@torch.no_grad()
def test_plans_commute_with_a_permutation_of_the_patches(vit, name):
    images, shuffle = torch.randn(2, 3, 32, 32), torch.randperm(64)
    patches = [place + 1 for place in shuffle.tolist()]
    position = torch.nn.Parameter(vit.pos_embed[:, [0, *patches]])
    tiles = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 3, 64, 4, 4)[:, :, shuffle]
    tiles = tiles.reshape(2, 3, 8, 8, 4, 4).transpose(3, 4).reshape(2, 3, 32, 32)
    model = tdm.attach(vit, STRATEGIES[name]()).eval()
    with tdm.kernels.use("triton"):
        logits, trace = model.trace(images)
        before, vit.pos_embed = vit.pos_embed, position
        others, again = model.trace(tiles)
    vit.pos_embed = before
    torch.testing.assert_close(others, logits, atol=1e-4, rtol=1e-3)
    for mine, theirs in zip(trace.layers, again.layers, strict=True):
        assert torch.equal(mine.assignment[:, shuffle], theirs.assignment)


@pytest.mark.parametrize("name", ["tdm", "ward", "tome"])
def test_gradients_flow_in_both_forms(vit, name):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    gradients = []
    for form in ("torch", "triton"):
        model = tdm.attach(vit, STRATEGIES[name]()).train()
        with tdm.kernels.use(form):
            loss = model(images).square().sum()
        gradients.append(torch.autograd.grad(loss, list(vit.parameters())))
    vit.eval()
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["tdm", "ward", "tome"])
@torch.no_grad()
def test_graphs_hold_the_kernels(vit, name):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = tdm.attach(vit, STRATEGIES[name]()).eval()
    expected = model(images)
    with tdm.kernels.use("triton"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-4)
        exported = torch.export.export(model, (images,)).module()  # of torch's own operations
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=1e-4)
    assert "tdm_lightning" not in str(torch.export.export(model, (images,)).graph)


def test_auto_is_torch_on_a_cpu(vit, monkeypatch):
    def never(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr("tdm_lightning.ops.kernels.dispatch.import_module", never)
    assert tdm.kernels.current() == "auto"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        tdm.attach(vit, tdm.TDM(0.5, (1,)))(torch.randn(1, 3, 32, 32))
