"""The diversity score against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.metrics import DiversityScore, diversity_score

NORMS = {
    "medoid": lambda r: np.abs(r).sum(),
    "column": lambda r: np.linalg.norm(r, 1),
    "composite": lambda r: np.sqrt(np.linalg.norm(r, 1) * np.linalg.norm(r, np.inf)),
}


def by_definition(z, norm):
    return min(NORMS[norm](z - z[j]) for j in range(len(z)))


@pytest.mark.parametrize("norm", NORMS)
@given(n=st.integers(1, 12), width=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_equals_the_definition(norm, n, width, seed):
    z = torch.randn(3, n, width, generator=torch.Generator().manual_seed(seed))
    wanted = [by_definition(image.double().numpy(), norm) for image in z]
    np.testing.assert_allclose(diversity_score(z, norm), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(diversity_score(z[0], norm), wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        diversity_score(z, norm, normalize=True),
        np.array(wanted) / (n * width),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_padding_does_not_count(norm, normalize):
    z, valid = 3 + torch.randn(3, 7, 4), torch.rand(3, 7) < 0.5
    valid[2] = False
    scores = diversity_score(z, norm, normalize, valid)
    for image in (0, 1):
        torch.testing.assert_close(
            scores[image], diversity_score(z[image, valid[image]], norm, normalize)
        )
        torch.testing.assert_close(
            scores[image], diversity_score(z[image], norm, normalize, valid[image])
        )
        assert scores[image] != diversity_score(z[image], norm, normalize)
    assert scores[2] == 0
    torch.testing.assert_close(
        diversity_score(z, norm, normalize, torch.ones_like(valid)),
        diversity_score(z, norm, normalize),
    )
    metric = DiversityScore(norm, normalize)
    metric.update(z, valid)
    torch.testing.assert_close(metric.compute(), scores.mean())
    with pytest.raises(
        ValueError, match=r"valid must have shape \(3, 7\), one entry per token, got \(3, 6\)"
    ):
        diversity_score(z, norm, normalize, valid[:, :6])


@pytest.mark.parametrize("norm", NORMS)
def test_collapsed_tokens_have_no_diversity(norm):
    assert diversity_score(torch.randn(2, 1, 8).expand(2, 10, 8), norm).tolist() == [0, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_order_does_not_matter_and_scale_does(norm):
    z = torch.randn(2, 9, 4)
    torch.testing.assert_close(
        diversity_score(z[:, torch.randperm(9)], norm), diversity_score(z, norm)
    )
    torch.testing.assert_close(
        diversity_score(3 * z + 5, norm), 3 * diversity_score(z, norm), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_do_not_overflow(dtype):
    z = torch.zeros(1, 100, 64, dtype=dtype)
    z[:, ::2] = 100
    score = diversity_score(z)
    assert score.dtype == torch.float32
    assert score.item() == 50 * 64 * 100


@pytest.mark.parametrize("norm", NORMS)
def test_metric_is_the_mean_over_images_of_uneven_batches(norm):
    z = torch.randn(7, 6, 4)
    metric = DiversityScore(norm)
    for batch in (z[:4], z[4:6], z[6]):
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), diversity_score(z, norm).mean())
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()


def test_processes_add_up():
    """What DDP does to sum states, by hand: two processes that saw uneven parts agree with one that
    saw everything.
    """
    z = torch.randn(5, 6, 4)
    parts = [DiversityScore(), DiversityScore()]
    parts[0].update(z[:4])
    parts[1].update(z[4:])
    whole = DiversityScore()
    whole.update(z)
    for state, reduction in whole._reductions.items():
        gathered = torch.stack([getattr(part, state) for part in parts])
        torch.testing.assert_close(
            reduction(gathered).double(), getattr(whole, state).double(), rtol=1e-6, atol=0
        )


def test_metric_keeps_no_graph():
    metric = DiversityScore()
    metric.update(torch.randn(1, 4, 2, requires_grad=True))
    assert not metric.total.requires_grad


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3, 4), (2, 0, 3)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="N×C or B×N×C"):
        diversity_score(torch.zeros(shape))


def test_bad_norm():
    with pytest.raises(
        ValueError, match="norm must be one of 'medoid', 'column', 'composite', got 'l2'"
    ):
        diversity_score(torch.zeros(2, 2), "l2")
    with pytest.raises(ValueError, match="norm must be one of"):
        DiversityScore("l2")
