"""How much a reducing layer dispatches: what a small batch on a fast device pays for."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.compare.launches import operations

#: Operations that a reducing layer may add to a block, views left out; the fractions are of what
#: a pass does once.
MOST = {
    "TDM": 53,
    "WardTDM": 88,
    "ToMe": 22,
    "EViT": 11,
    "TopK": 8,
    "Random": 4,
    "DPCKNN": 31,
    "PiToMe": 28,
    "ToFu": 38,
    "DiffRate": 53,
    "MCTF": 103,
}


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("deit_tiny_patch16_224", embed_dim=32, num_heads=2).eval()


def dispatched(vit, strategy):
    """What a pass dispatches, and in how many blocks tokens leave."""
    model, images = tdm.attach(vit, strategy).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        counts = model.trace(images)[1].token_counts  # and what is made once is there
    operations(lambda: model.run(images))
    names = operations(lambda: model.run(images))
    return len(names), sum(a > b for a, b in zip([196, *counts], counts, strict=False))


@pytest.mark.parametrize("name", MOST)
def test_operations_of_a_reducing_layer(vit, name):
    plain, _ = dispatched(vit, tdm.Strategy())
    reduced, layers = dispatched(vit, getattr(tdm, name)())
    assert layers > 0
    assert (reduced - plain) / layers <= MOST[name]


def test_a_plain_strategy_adds_nothing(vit):
    images = torch.randn(2, 3, 224, 224)
    assert dispatched(vit, tdm.Strategy())[0] == len(operations(lambda: vit(images)))
