"""What counts cost, without running a model for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Settings that are counted to fit the others.
_SAMPLES = 24


def fitted_cost(
    depth: int,
    patches: int,
    layers: Sequence[int],
    exact: Callable[[list[int]], float],
    seed: int = 0,
) -> Callable[[list[int]], float]:
    """A quick form of an exact cost: a polynomial of the tokens that enter and leave each block.

    Linear layers and attention are such polynomials, and so are mergers but for rounding; use the
    exact cost for what is reported.

    Args:
        depth: number of blocks.
        patches: patch tokens that enter the first.
        layers: the blocks that may reduce.
        exact: counts the cost of the tokens that each block leaves; ``ValueError`` where the merger
            cannot do that.
        seed: of the settings that it is fitted to.

    Raises:
        ValueError: if no setting that was tried can be done.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, costs, error = [], [], None
    for number in range(_SAMPLES):
        draws = torch.rand(depth, generator=generator).tolist()
        shares = [draw if block in layers else 0.0 for block, draw in enumerate(draws)]
        counts = counts_of(shares, 4 * number / (_SAMPLES - 1) / max(1, len(layers)), patches)
        try:
            costs.append(exact(counts))
        except ValueError as refused:
            error = refused
            continue
        rows.append(_features(counts, patches))
    if error is not None and len(rows) < 2:
        raise error
    table, target = torch.stack(rows), torch.tensor(costs, dtype=torch.float64)
    scale = table.abs().amax(dim=0).clamp(min=1)
    weights = torch.linalg.lstsq(table / scale, target.unsqueeze(1), driver="gelsd").solution
    return lambda counts: float((_features(counts, patches) / scale) @ weights.squeeze(1))


def counts_of(shares: Sequence[float], strength: float, patches: int) -> list[int]:
    """Tokens that each block leaves where block l keeps the share ``exp(−strength·shares[l])``.

    >>> counts_of([1.0, 0.0, 1.0], 0.693148, 8)
    [4, 4, 2]
    """
    counts, left = [], float(patches)
    for share in shares:
        left *= math.exp(-strength * share)
        counts.append(max(1, math.ceil(left - 1e-9)))
    return counts


def _features(counts: Sequence[int], patches: int) -> Tensor:
    """Sums over the blocks of what a block's cost is made of."""
    total = torch.zeros(9, dtype=torch.float64)
    for enters, leaves in zip([patches, *counts[:-1]], counts, strict=True):
        merges = float(leaves < enters)
        own = [merges, enters * merges, enters**2 * merges, enters * leaves * merges]
        total += torch.tensor([1, enters, enters**2, leaves, *own, (enters - leaves) ** 2])
    return total
