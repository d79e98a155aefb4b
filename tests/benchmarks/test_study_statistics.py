"""The paired bootstrap, against drawing images one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.study.results import Result
from benchmarks.study.statistics import paired_difference
from benchmarks.study.tables import ablation_table, accuracy_table, difference, difference_table


def drawn_one_by_one(ours, theirs, resamples, seed):
    random = np.random.default_rng(seed)
    difference = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    means = [
        difference[random.integers(0, len(difference), len(difference))].mean()
        for _ in range(resamples)
    ]
    return np.quantile(means, (0.025, 0.975))


def answers(seed, images=400, share=0.8, count=2):
    random = np.random.default_rng(seed)
    return [random.random(images) < share for _ in range(count)]


def test_interval_agrees_with_drawing_images_one_by_one():
    ours, theirs = answers(0), answers(1, share=0.7)
    found = paired_difference(ours, theirs)
    low, high = drawn_one_by_one(ours, theirs, 4000, 2)
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.low == pytest.approx(low, abs=0.004)
    assert found.high == pytest.approx(high, abs=0.004)


def test_pairs_count():
    """Two methods that are right on the same images differ surely, however little."""
    right = answers(0, images=2000, count=1)[0]
    worse = right.copy()
    worse[np.flatnonzero(right)[:20]] = False
    found = paired_difference([right], [worse])
    assert found.mean == pytest.approx(0.01)
    assert found.significant
    assert found.low > 0.005


def test_equal_runs_do_not_differ():
    run = answers(0)
    found = paired_difference(run, run)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.significant


def test_repeatable():
    ours, theirs = answers(0), answers(1)
    assert paired_difference(ours, theirs) == paired_difference(ours, theirs)
    assert paired_difference(ours, theirs, seed=1) != paired_difference(ours, theirs)


@pytest.mark.parametrize("theirs", [[], answers(1, count=1), answers(1, images=10)])
def test_runs_that_are_no_pairs(theirs):
    with pytest.raises(ValueError, match="as many runs on the same images"):
        paired_difference(answers(0), theirs)


def result(method, rate, seed, correct):
    return Result(
        method,
        rate,
        seed,
        gmacs=0.1,
        accuracy={"after": correct.mean()},
        correct={"after": correct},
    )


def test_common_seeds_are_compared_and_every_keep_rate_counts_once():
    a, b, c, d, e = answers(3, count=5)
    results = [
        result("TDM", 0.5, 1, a),
        result("TDM", 0.5, 2, b),
        result("TDM", 0.3, 1, c),
        result("EViT", 0.5, 1, d),
        result("EViT", 0.5, 2, e),
        result("EViT", 0.3, 1, a),
        result("EViT", 0.3, 9, b),
    ]
    found = difference(results, "TDM", "EViT", [0.5, 0.3], "after")
    of_rates = [(a.mean() + b.mean() - d.mean() - e.mean()) / 2, c.mean() - a.mean()]
    assert found.mean == pytest.approx(np.mean(of_rates))
    assert difference(results, "TDM", "EViT", [0.7], "after") is None


def test_tables():
    same, fewer = np.ones(100, dtype=bool), np.arange(100) < 90
    results = [result("Plain", 1.0, 1, same)]
    results += [result("TDM", rate, 1, same) for rate in (0.5, 0.3)]
    results += [result("EViT", 0.5, 1, fewer), Result("EViT", 0.3, 1)]
    assert accuracy_table(results, "after").splitlines()[-1] == "| EViT | 90.00 | – |"
    assert "| EViT | **+10.00 (" in difference_table(results, "after")
    assert difference_table(results, "after").rstrip().endswith("| – | – |")
    changed = [result("default", 0.5, 1, same), result("other", 0.5, 1, fewer)]
    assert "**-10.00 (" in ablation_table(changed, "default")
    assert not math.isnan(results[1].accuracy["after"])
