"""What was measured, as files: values of every crop, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.fidelity.measure import Fidelity, mean_and_error
from tdm_lightning.core.tables import append_csv, markdown, read_csv
from tdm_lightning.visualize.plots import label_beside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"pooled": "feature that a classifier reads", "dense": "patch features"}


def add(path: Path, found: Fidelity) -> None:
    """Append one method's values to ``fidelity.csv``."""
    append_csv(
        path,
        {
            "method": found.method,
            "rate": found.rate,
            "gmacs": f"{found.gmacs:.6f}",
            "draw": found.draw,
            **{kind: " ".join(f"{v:.5f}" for v in getattr(found, kind)) for kind in KINDS},
        },
    )


def read(path: Path) -> list[Fidelity]:
    """What :func:`add` wrote; none where there is no file."""
    return [
        Fidelity(
            row["method"],
            float(row["rate"]),
            float(row["gmacs"]),
            int(row["draw"]),
            *(list(map(float, row[kind].split())) for kind in KINDS),
        )
        for row in read_csv(path)
    ]


def text(found: Sequence[Fidelity]) -> str:
    """A table for each kind: 100·(1 − cosine), the mean of the draws, and in brackets the standard
    error of one.
    """
    rates = sorted({one.rate for one in found}, reverse=True)
    draws = sorted({one.draw for one in found})
    crops = len(found[0].pooled) if found else 0
    parts = []
    for kind, title in KINDS.items():
        rows = []
        for method in dict.fromkeys(one.method for one in found):
            cells = [
                _cell([o for o in found if (o.method, o.rate) == (method, r)], kind) for r in rates
            ]
            rows.append([method, *cells])
        head = (
            f"100·(1 − cosine) of the {title}, at the multiply-accumulates of TDM's keep rates:"
            f" mean over {len(draws)} draws of {crops} crops (standard error of one draw)."
        )
        parts.append(f"{head}\n\n{markdown(['method', *(f'{rate:g}' for rate in rates)], rows)}")
    return "\n\n".join(parts) + "\n"


def figure(found: Sequence[Fidelity]) -> Figure:
    """Both kinds against the multiply-accumulates."""
    from benchmarks.study.figures import STYLES, axis_at_right, end_labels, errorbar, panels

    drawn, axes = panels([f"distortion of the {title}" for title in KINDS.values()])
    for axis, kind in zip(axes, KINDS, strict=True):
        shown = {}
        for method in STYLES:
            shown[method] = []
            for rate in sorted({one.rate for one in found}):
                chosen = [o for o in found if (o.method, o.rate) == (method, rate)]
                means = [100 * fmean(getattr(one, kind)) for one in chosen]
                if means:
                    mean = fmean(means)
                    spread = mean - min(means), max(means) - mean
                    shown[method].append((chosen[0].gmacs, mean, *spread))
            errorbar(axis, shown[method], method)
        axis.set_yscale("log")
        axis_at_right(axis)
        axis.set_xlabel("GMACs per image, everything counted")
        axis.set_ylabel("100·(1 − cosine)")
        label_beside(axis, end_labels(shown, -math.inf, "left"), "left")
    return drawn


def _cell(found: Sequence[Fidelity], kind: str) -> str:
    if not found:
        return "–"
    pairs = [mean_and_error([100 * value for value in getattr(one, kind)]) for one in found]
    error = math.sqrt(fmean(error**2 for _, error in pairs))
    return f"{fmean(mean for mean, _ in pairs):.2f} ({error:.2f})"
