"""How sure a difference between two methods is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tdm_lightning.errors import SettingError


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies, in [-1, 1], with its 95 % bootstrap interval.

    Attributes:
        mean: the difference.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Accuracy of one method minus that of another on the same images, by the percentile bootstrap
    over images.

    Runs are averaged for every image before images are drawn, so the interval tells what other
    images would give; it does not tell what other seeds would.

    Args:
        ours: which images were right, N bool, once per run (a seed, or a keep rate).
        theirs: likewise for as many runs of the other method.
        resamples: sets of images to draw.
        seed: of the drawing.

    Raises:
        ValueError: if the two do not have as many runs, or not of the same images.

    >>> paired_difference([np.array([True, True, False])], [np.array([True, False, False])]).mean
    0.3333333333333333
    """
    shapes = {run.shape for run in (*ours, *theirs)}
    if len(ours) != len(theirs) or not len(ours) or len(shapes) != 1:
        raise SettingError(
            f"both methods need as many runs on the same images, got {len(ours)} and {len(theirs)}"
            f" runs of {', '.join(str(shape[0]) for shape in sorted(shapes))} images"
        )
    difference = np.mean([run.astype(float) for run in ours], axis=0) - np.mean(
        [run.astype(float) for run in theirs], axis=0
    )
    # How often each distinct value is drawn is all that a mean depends on: a multinomial draw
    # instead of one per image.
    values, counts = np.unique(difference.round(9), return_counts=True)
    total = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    low, high = np.quantile(drawn @ values / total, (0.025, 0.975))
    return Difference(float(difference.mean()), float(low), float(high))
