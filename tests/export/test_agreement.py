"""Whether a file gives what a model gives, near ties aside."""

import pytest
import torch
from torch import nn

from tdm_lightning.export.agreement import Agreement, compare_logits


class Decided(nn.Module):
    """Two logits that one decision exchanges: whether the mean of an image is positive."""

    def forward(self, images):
        up = (images.double().mean(dim=(1, 2, 3)) > 0).float()
        return torch.stack((up, 1 - up), dim=1)


def image(mean):
    """Pixels of both signs whose mean is nearly ``mean``."""
    half = torch.full((1, 1, 2, 4), 1.0)
    return torch.cat((half + mean, -half + mean), dim=2)


def the_other_way(images):
    return 1 - Decided()(images)


def test_an_image_that_rounding_decides_is_left_out():
    clear, tied = image(0.1), image(1e-9)

    def run(images):
        logits = Decided()(images)
        return torch.where(
            (images == tied).flatten(1).all(dim=1, keepdim=True), 1 - logits, logits + 1e-5
        )

    found = compare_logits(Decided(), run, [clear, torch.cat((tied, clear))])
    assert found == Agreement(pytest.approx(1e-5, rel=1e-2), 2, 1)


def test_a_mistake_is_not_excused_by_near_ties_beside_it():
    with pytest.raises(
        ValueError,
        match=r"2 of 2 images: they differ by up to 1, and 0\.0001 is allowed.*rounding is not",
    ):
        compare_logits(Decided(), the_other_way, [torch.cat((image(1e-9), image(0.1)))])


def test_nothing_to_compare_but_near_ties():
    with pytest.raises(ValueError, match="could not be compared.*all 3 images"):
        compare_logits(Decided(), the_other_way, [image(1e-9).repeat(3, 1, 1, 1)])


@pytest.mark.parametrize("mean", [0.1, 1e-9], ids=["clear", "tied"])
def test_nan_is_a_mistake(mean):
    with pytest.raises(ValueError, match="differ by up to nan"):
        compare_logits(Decided(), lambda images: Decided()(images) * torch.nan, [image(mean)])


def test_the_tolerance_grows_with_the_logits():
    model = nn.Flatten()
    images = torch.full((1, 1, 1, 2), 100.0)
    assert compare_logits(model, lambda x: model(x) + 5e-3, [images]).difference == pytest.approx(
        5e-3, rel=1e-2
    )
    with pytest.raises(ValueError, match=r"0\.01 is allowed"):
        compare_logits(model, lambda x: model(x) + 2e-2, [images])
