"""SViTE: the dense network that masks end in, and weights from elsewhere."""

import copy

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning import sparsity
from tdm_lightning.sparsity import Structured, Unstructured
from tests.helpers.svites import KINDS, fresh, masks, perturbed, small, train

# Extraction -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"global_pool": "avg"},
    ],
    ids=str,
)
def test_extraction_is_exact(changes):
    model = small(tdm.SViTE(Structured(0.7, 0.6)), **changes).eval()
    for parameter in model.vit.parameters():
        parameter.normal_(std=0.3)
    sparsity.apply_masks(model)
    before = copy.deepcopy(model.vit.state_dict())
    dense = sparsity.extract_dense(model)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)
    block = dense.blocks[0]
    assert (block.attn.num_heads, block.attn.attn_dim, block.attn.head_dim) == (2, 16, 8)
    assert (block.attn.qkv.out_features, block.attn.proj.in_features) == (48, 16)
    assert (block.mlp.fc1.out_features, block.mlp.fc2.in_features) == (57, 57)
    assert not dense.training
    assert all(torch.equal(value, before[name]) for name, value in model.vit.state_dict().items())
    for fused in (True, False):
        for layer in dense.blocks:
            layer.attn.fused_attn = fused
        torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [
        tdm.TDM(0.6, (1, 2)),
        tdm.TDM(0.6, (1, 2), tdm.TokenMerger(proportional_attention=True)),
        tdm.EViT(0.6, (1, 2)),
        tdm.ToMe(2),
        tdm.EvoViT(0.5, layers=(1, 2)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_extraction_is_exact_under_token_reduction(other):
    model = small(
        [tdm.SViTE(Structured(0.7, 0.6)), other],
        global_pool="avg" if other.requires().pooling else "token",
    ).eval()
    for parameter in model.vit.parameters():
        parameter.normal_(std=0.3)
    sparsity.apply_masks(model)
    again = type(other).from_config(other.config())
    dense = tdm.attach(sparsity.extract_dense(model), again).eval()
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)
    assert tdm.flops.count_macs(dense) == tdm.flops.count_macs(model)
    assert dense.trace(x)[1].token_counts == model.trace(x)[1].token_counts


def test_extraction_after_training():
    model = train(small(tdm.SViTE(interval=3)), 10)
    x = torch.randn(3, 3, 16, 16)
    dense = sparsity.extract_dense(model)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)
    dense(x).sum().backward()  # it can be fine-tuned
    assert all(parameter.grad is not None for parameter in dense.parameters())


def test_what_cannot_be_extracted():
    with pytest.raises(ValueError, match=r"not in force.*apply_masks\(model\)"):
        sparsity.extract_dense(small(tdm.SViTE()))
    with pytest.raises(TypeError, match="these masks are of single weights"):
        sparsity.extract_dense(small(tdm.SViTE(Unstructured())))
    for verb in (
        sparsity.extract_dense,
        sparsity.apply_masks,
        sparsity.adopt_masks,
        sparsity.active_parameters,
    ):
        for model in (small(tdm.TDM(0.7, (1,))), timm.create_model("test_vit")):
            with pytest.raises(TypeError, match="takes a model with masks"):
                verb(model)


@torch.no_grad()
def test_multiply_accumulates_count_the_extracted_model():
    model = small(tdm.SViTE(Structured(0.7, 0.6)))
    plain, report = tdm.flops.count_macs(model.vit), tdm.flops.mac_report(model)
    sparsity.apply_masks(model)
    dense = tdm.flops.count_macs(sparsity.extract_dense(model))
    assert tdm.flops.count_macs(model) == report.backbone == dense < plain == report.plain
    assert tdm.flops.count_macs(small(tdm.SViTE(Unstructured(0.4)))) == plain
    assert tdm.flops.count_macs(model, images=torch.randn(2, 3, 16, 16)) == dense


# Weights from elsewhere -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_official_files_and_their_masks(tmp_path, kind):
    """DeiT's names under ``model``, masks beside them; the zeros are in the weights."""
    author = perturbed(small(tdm.SViTE(fresh(kind), seed=5)))
    sparsity.apply_masks(author)
    file = {
        "model": author.vit.state_dict(),
        "mask": {},
        "atten_mask": {"x": torch.ones(2)},
        "other_mask": {},
        "mask_step": 7,
    }
    torch.save(file, tmp_path / "svite.pth")
    model = small(tdm.SViTE(fresh(kind)))
    tdm.checkpoints.load_official(model, tmp_path / "svite.pth")
    assert not model.strategy.masks.enforced(model.vit)
    sparsity.adopt_masks(model)
    expected = masks(author)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model).items())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), author.eval()(x))
    if isinstance(kind, Structured):
        torch.testing.assert_close(sparsity.extract_dense(model)(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_without_any_head_are_not_adopted():
    model = small(tdm.SViTE())
    model.vit.blocks[2].attn.qkv.weight.zero_()
    with pytest.raises(ValueError, match="block 2 has no active head"):
        sparsity.adopt_masks(model)
