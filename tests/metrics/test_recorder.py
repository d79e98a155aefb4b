"""What the recorder hears of images that keep different numbers of tokens."""

import pytest
import torch

from tdm_lightning.metrics import DiversityRecorder
from tests.vit.test_dense import reduced


def scores(model, images):
    recorder = DiversityRecorder(model)
    with recorder, torch.no_grad():
        model(images)
    return torch.stack(recorder.compute())


@pytest.mark.parametrize("name", ["avit", "spvit", "iared2"])
def test_an_images_score_does_not_depend_on_its_batch(name):
    """In a batch images are padded to the longest, alone they are not."""
    torch.manual_seed(4)
    model, images = reduced(name), torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        counts = torch.stack(model.trace(images)[1].token_counts)
    assert (counts.amin(dim=1) < counts.amax(dim=1)).any()
    alone = torch.stack([scores(model, image) for image in images.split(1)]).mean(dim=0)
    torch.testing.assert_close(scores(model, images), alone, rtol=1e-4, atol=1e-4)


def test_halted_tokens_do_not_count_in_training_either():
    torch.manual_seed(4)
    model, images = reduced("avit").train(), torch.randn(3, 3, 32, 48)
    training = scores(model, images)
    torch.testing.assert_close(training, scores(model.eval(), images), rtol=1e-4, atol=1e-4)
