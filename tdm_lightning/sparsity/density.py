"""How many weights each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdős–Rényi-kernel densities: a layer's share falls with its size, the overall share is
    as asked for.

    A layer of shape (d₁, …, dₙ) keeps ``min(1, ε · Σdᵢ / Πdᵢ)`` of its weights, with
    the ε that makes the total right (Mocanu et al., 2018; Evci et al., 2020).

    Args:
        shapes: of the layers' weights.
        density: share of all weights together, in (0, 1].

    Returns:
        A share in (0, 1] for each layer.

    >>> [round(share, 3) for share in erk_densities([(192, 192), (768, 192), (10, 4)], 0.4)]
    [0.571, 0.357, 1.0]
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    full: set[int] = set()
    while len(full) < len(shapes):
        rest = [index for index in range(len(shapes)) if index not in full]
        left = density * sum(sizes) - sum(sizes[index] for index in full)
        epsilon = left / sum(raw[index] * sizes[index] for index in rest)
        largest = max(raw[index] for index in rest)
        if epsilon * largest <= 1:
            return [1.0 if index in full else epsilon * raw[index] for index in range(len(shapes))]
        full |= {index for index in rest if raw[index] == largest}
    return [1.0] * len(shapes)
