"""Where TDM's merger works: other blocks than the paper's three, at equal multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.study.plan import METHODS, Cell, Method, crossed
from tdm_lightning.strategies import TDM

RATES = (0.7, 0.5, 0.3)

_BLOCKS = (
    (2, 5, 8),
    (1, 4, 7),
    (0, 3, 6, 9),
    (0, 2, 4, 6, 8, 10),
    (1, 3, 5, 7, 9),
    (2, 4, 6, 8, 10),
    (1, 4, 7, 10),
    tuple(range(1, 11)),
)

#: TDM in the paper's blocks and ToMe, and TDM in others, counted from 0.
PLACEMENTS = (
    *(method for method in METHODS if method.name in ("TDM", "ToMe")),
    *(
        Method(f"blocks {' '.join(map(str, blocks))}", partial(TDM, layers=blocks))
        for blocks in _BLOCKS
    ),
)


def placement_cells(
    methods: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """The placements in the order to run them; arguments as
    :func:`~benchmarks.study.plan.grid_cells`, one seed by default.

    Raises:
        ValueError: if there is no such placement.
    """
    return crossed(PLACEMENTS, RATES, methods, rates, seeds)
