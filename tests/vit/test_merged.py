"""Merged tokens with their sizes, for a model that reads them in place of all patches."""

import pytest
import torch

import tdm_lightning as tdm
from tests.vit.test_dense import STRATEGIES, reduced
from tests.vit.test_dense import images as images  # a fixture
from tests.vit.test_families import MODELS, made


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_they_are_what_dense_features_spread_out(images, name):
    """In a loop over the patches: a token whenever one comes that no token before it holds."""
    model = reduced(name)
    for index in (2, -1):
        torch.manual_seed(6)  # for the strategy that draws
        layers = model.trace(images)[1].layers
        held = [layer.assignment for layer in layers if layer.index <= index % 4][-1]
        torch.manual_seed(6)
        (dense,) = model.forward_intermediates(
            images, [index % 4], output_fmt="NLC", intermediates_only=True
        )
        torch.manual_seed(6)
        patches, size = model.forward_merged(images, index)
        assert patches.shape == (*size.shape, 32)
        assert size.dtype == torch.float32
        for image in range(3):
            found = {}
            for patch, token in enumerate(held[image].tolist()):
                if token >= 0:
                    found.setdefault(token, []).append(patch)
            count = len(found)
            assert size[image, :count].tolist() == [len(members) for members in found.values()]
            assert not size[image, count:].any()
            firsts = [members[0] for members in found.values()]
            assert torch.equal(patches[image, :count], dense[image, firsts])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_family_gives_its_patches_where_nothing_is_reduced(name):
    vit, images = made(name), torch.randn(2, 3, 32, 32)
    patches, size = tdm.attach(vit, tdm.TDM(1.0, (1,))).forward_merged(images, -2, norm=True)
    depth = len(vit.blocks)
    (wanted,) = vit.forward_intermediates(
        images, [depth - 2], norm=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(patches, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(size, torch.ones(2, wanted.shape[1]))


def test_later_blocks_do_not_run_and_gradients_flow(images):
    model, blocks = reduced("tdm"), []
    for index, point in enumerate(model.hook_points):
        point.register_forward_hook(lambda *_, index=index: blocks.append(index))
    patches, size = model.forward_merged(images.requires_grad_(), -2)
    assert blocks == [0, 1, 2]
    assert size.sum(dim=1).tolist() == [24, 24, 24]
    patches.square().sum().backward()
    assert (images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum(dim=(1, 4, 5)) > 0).all()


def test_another_block_is_refused(images):
    for index in (4, -5):
        with pytest.raises(ValueError, match=f"index must be that of one of 4 blocks, got {index}"):
            reduced("tdm").forward_merged(images, index)
