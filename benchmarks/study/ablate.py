"""The ablation: TDM with one of its merger's arguments changed at a time, at equal keep rates and
so equal token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.study.plan import Cell, Method, crossed
from tdm_lightning.mergers import TokenMerger
from tdm_lightning.strategies import TDM, Strategy

#: Keep rates to ablate at: few enough tokens for the merger to matter.
RATES = (0.5, 0.3)
#: So small that every layer makes as few clusters as its budget allows.
_FEWEST = 1e-3

#: The line that all others are compared with.
DEFAULT = "default"

_CHANGES: tuple[dict[str, Any], ...] = (
    {"cluster_fraction": 0.05},
    {"cluster_fraction": 0.125},
    {"cluster_fraction": 0.5},
    {"cluster_fraction": 1.0},
    {"density": "knn"},
    {"cluster_weights": "mean"},
    {"matching": "greedy"},
    {"match_weights": "mean"},
    {"cluster_weights": "size", "match_weights": "size"},
    {"features": "normed"},
    {"features": "keys"},
    {"per_patch": True},
    {"proportional_attention": False},
    {"cluster_weights": "size", "match_weights": "size", "features": "keys"},
    {"cluster_weights": "size", "match_weights": "size", "per_patch": True},
    {"cluster_weights": "size", "match_weights": "size", "features": "keys", "per_patch": True},
    {"cluster_weights": "mean", "match_weights": "mean"},
    {"cluster_weights": "mean", "match_weights": "mean", "features": "keys"},
)


def _with(arguments: Callable[[float], dict[str, Any]], rate: float) -> Strategy:
    return TDM(rate, merger=TokenMerger(**arguments(rate)))


def _change(change: dict[str, Any]) -> Method:
    name = ", ".join(f"{key}={value}" for key, value in change.items())
    return Method(name, partial(_with, lambda rate: change), solve=False)


def _attentive(rate: float, share: float) -> float:
    """An attentive ratio that lies above or below a keep rate by a share of what is reduced."""
    return round(rate + share * (1 - rate), 4)


#: By default there is a cluster for every four inattentive tokens, and as many pairs are fused.
#: "Clusters only" forms as many clusters and no pair, so fewer tokens are attentive; "matching
#: only" fuses as many pairs and leaves one cluster for the rest; "neither" has one cluster and the
#: one pair that pays for it.
VARIANTS = (
    Method(DEFAULT, partial(_with, lambda rate: {}), solve=False),
    *(_change(change) for change in _CHANGES),
    Method(
        "clusters only",
        partial(
            _with,
            lambda rate: {"attentive_ratio": _attentive(rate, -0.25), "cluster_fraction": _FEWEST},
        ),
        solve=False,
    ),
    Method(
        "matching only",
        partial(
            _with,
            lambda rate: {"attentive_ratio": _attentive(rate, 0.25), "cluster_fraction": _FEWEST},
        ),
        solve=False,
    ),
    Method("neither", partial(_with, lambda rate: {"cluster_fraction": _FEWEST}), solve=False),
    Method(
        "fewer attentive",
        partial(_with, lambda rate: {"attentive_ratio": _attentive(rate, -0.1)}),
        solve=False,
    ),
    Method(
        "more attentive",
        partial(_with, lambda rate: {"attentive_ratio": _attentive(rate, 0.1)}),
        solve=False,
    ),
)


def ablation_cells(
    methods: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """The ablation in the order to run it; arguments as
    :func:`~benchmarks.study.plan.grid_cells`, with one seed by default.

    Raises:
        ValueError: if there is no such variant.
    """
    return crossed(VARIANTS, RATES, methods, rates, seeds)
