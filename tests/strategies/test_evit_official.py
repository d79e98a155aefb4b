"""EViT against tensors recorded from the official code."""

import functools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm


@pytest.fixture(scope="module")
def official(golden):
    facts, tensors = golden("evit_a")
    kwargs = dict(facts["constructor"])
    norm = functools.partial(torch.nn.LayerNorm, eps=kwargs.pop("layernorm_eps"))
    vit = VisionTransformer(norm_layer=norm, **kwargs).eval()
    tdm.checkpoints.load_official(
        vit, {name[11:]: value for name, value in tensors.items() if name.startswith("state_dict.")}
    )
    model = tdm.attach(
        vit, tdm.EViT(facts["method"]["keep_rate"], facts["method"]["reduction_layers"])
    )
    with torch.no_grad():
        return model, tensors, model.run(tensors["input"], trace=True)


def test_logits_and_features(official):
    _, tensors, output = official
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features, tensors["features"], atol=2e-4, rtol=0)


def test_token_counts(official):
    _, tensors, output = official
    assert [count + 1 for count in output.trace.token_counts] == tensors["token_counts"].tolist()


@pytest.mark.parametrize("layer", [3, 6, 9])
def test_importance_and_kept_indices(official, layer):
    _, tensors, output = official
    seen = next(trace for trace in output.trace.layers if trace.index == layer)
    torch.testing.assert_close(seen.importance, tensors[f"cls_attn.{layer}"], atol=1e-6, rtol=1e-4)
    kept = tensors[f"kept.{layer}"]
    assert torch.equal(seen.importance.topk(kept.shape[1], dim=1).indices, kept)


@pytest.mark.parametrize("layer", [3, 6, 9])
def test_assignment_names_the_official_token_of_every_patch(official, layer):
    """A patch that is the n-th official token is where the trace says it is; all others are in
    fused tokens.
    """
    _, tensors, output = official
    seen = next(trace for trace in output.trace.layers if trace.index == layer)
    patches = tensors[f"kept_patch.{layer}"]
    for image in range(patches.shape[0]):
        places = {patch: place for place, patch in enumerate(patches[image].tolist()) if patch >= 0}
        held = seen.assignment[image].tolist()
        assert all(held[patch] == place for patch, place in places.items())
        fused = {place for place, patch in enumerate(patches[image].tolist()) if patch < 0} | {
            patches.shape[1]
        }
        assert {held[patch] for patch in range(len(held)) if patch not in places} <= fused


def test_switching_the_reduction_off_shows(official):
    """The fixture can tell a reduction that does nothing, and one that takes another number of
    tokens.
    """
    model, tensors, _ = official
    for strategy in (tdm.EViT(1.0), tdm.EViT(0.68), tdm.EViT(0.7, fuse=False)):
        with torch.no_grad():
            other = tdm.attach(model.vit, strategy)(tensors["input"])
        assert (other - tensors["logits"]).abs().amax(1).min() > 1e-3
