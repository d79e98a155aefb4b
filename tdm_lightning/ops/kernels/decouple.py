"""TDM's plan in one launch: ranks, matched pairs of the attentive, clusters of the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_lightning.ops.kernels.inner import inner_products
from tdm_lightning.ops.kernels.parts import (
    ROWS,
    STAGES,
    WARPS,
    cheapest,
    columns,
    finite,
    lengths,
    ranks,
    scratch,
    whole,
)

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


def decouple(x: Tensor, score: Tensor, attentive: int, pairs: int, clusters: int) -> Tensor:
    """The groups of TDM's merger with its gaussian density and bipartite matching.

    Of equal scores, proposals and centers the first counts.

    Args:
        x: what is compared, B×N×D, of any float type and any strides, of at most
            :data:`~tdm_lightning.ops.kernels.limits.MOST` tokens.
        score: what ranks the tokens, the highest first, B×N.
        attentive: the first so many ranks are matched,
            :func:`tdm_lightning.ops.match_pairs`; ``0 ≤ attentive ≤ N``.
        pairs: that are fused of them, ``0 ≤ pairs ≤ attentive//2``.
        clusters: of the others, :func:`tdm_lightning.ops.cluster_density_peaks`; 0 only where
            there are none.

    Returns:
        The group of every token, in the order of ``x``, in ``0…attentive-pairs+clusters-1``: those
        of the attentive in the order of rank, then the clusters, the best center's first; B×N,
        int64.
    """
    batch, n, width = x.shape
    group = torch.empty(batch, n, dtype=torch.int64, device=x.device)
    if not group.numel():
        return group
    gram = spread = inner_products(x)
    if x.dtype in (torch.float32, torch.float64) and clusters:
        # Distances are differences of inner products: those of centred tokens are smaller and lose
        # less. Half precision has lost more than that before.
        spread = inner_products(x.float() - x.float().mean(dim=1, keepdim=True))
    with torch.cuda.device_of(x):
        _decouple[(batch,)](
            gram,
            spread,
            score.float().contiguous(),
            group,
            scratch(x, 2, torch.float32),
            scratch(x, 4, torch.int32),
            n,
            attentive,
            pairs,
            clusters,
            1.0 / width,
            ROWS=ROWS,
            COLS=columns(n),
            ODDS=columns(attentive // 2),
            REST=columns(n - attentive),
            WHOLE=whole(n),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return group


@triton.jit(do_not_specialize=["n", "attentive", "pairs", "clusters", "scale"])
def _decouple(
    gram: tl.tensor,
    spread: tl.tensor,
    score: tl.tensor,
    group: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    n: tl.tensor,
    attentive: tl.tensor,
    pairs: tl.tensor,
    clusters: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ODDS: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One program: one image. N² comparisons to rank, A/2 × A/2 similarities of the A attentive
    tokens, and four times the distances of the N − A others.
    """
    image = tl.program_id(0).to(tl.int64)
    gram += image * n * n
    spread += image * n * n
    score += image * n
    group += image * n
    keys = floats + image * 2 * n
    density = keys + n
    order = ints + image * 4 * n
    partner = order + n
    gone = partner + n
    number = gone + n

    place = tl.arange(0, WHOLE)
    value = tl.load(score + place, mask=place < n, other=0.0)
    _store_descending(keys, place, value, place < n)
    tl.debug_barrier()
    for first in range(0, n, ROWS):
        at = first + tl.arange(0, ROWS)
        tl.store(order + ranks(keys, n, at, COLS), at, mask=at < n)
    tl.debug_barrier()

    _match(gram, order, keys, partner, gone, n, attentive, pairs, ROWS, ODDS)
    tl.debug_barrier()
    rank = tl.arange(0, WHOLE)
    here = rank < attentive
    fused = tl.load(gone + rank // 2, mask=here & (rank % 2 == 0), other=0)
    tl.store(number + rank, tl.cumsum(1 - fused, 0) - 1, mask=here)
    tl.debug_barrier()
    into = 2 * tl.load(partner + rank // 2, mask=here & (fused == 1), other=0) + 1
    found = tl.load(number + tl.where(fused == 1, into, rank), mask=here, other=0)
    tl.store(group + tl.load(order + rank, mask=here, other=0), found, mask=here)
    tl.debug_barrier()

    rest = n - attentive
    order += attentive
    _density(spread, order, density, n, rest, scale, ROWS, REST)
    tl.debug_barrier()
    _scores(spread, order, density, keys, n, rest, scale, ROWS, REST)
    tl.debug_barrier()
    center, own = partner, number
    for first in range(0, rest, ROWS):
        at = first + tl.arange(0, ROWS)
        best = ranks(keys, rest, at, REST)
        tl.store(own + at, best, mask=at < rest)
        tl.store(center + best, at, mask=(at < rest) & (best < clusters))
    tl.debug_barrier()
    singles = attentive - pairs
    for first in range(0, rest, ROWS):
        at = first + tl.arange(0, ROWS)
        label = _nearest(spread, order, center, at, n, rest, clusters, scale, REST)
        best = tl.load(own + at, mask=at < rest, other=0)
        label = tl.where(best < clusters, best, label) + singles
        tl.store(group + tl.load(order + at, mask=at < rest, other=0), label, mask=at < rest)


@triton.jit
def _store_descending(keys: tl.tensor, place: tl.tensor, value: tl.tensor, mask: tl.tensor) -> None:
    """Keys whose ascending order is the descending one of values; what is none (NaN) comes first,
    as in torch.
    """
    tl.store(keys + place, tl.where(value == value, -value, -float("inf")), mask=mask)


@triton.jit
def _match(
    gram: tl.tensor,
    order: tl.tensor,
    keys: tl.tensor,
    partner: tl.tensor,
    gone: tl.tensor,
    n: tl.tensor,
    attentive: tl.tensor,
    pairs: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Of the tokens at even ranks: the most similar one at an odd rank, and which are fused."""
    evens = (attentive + 1) // 2
    odds = attentive // 2
    for first in range(0, evens, ROWS):
        even = first + tl.arange(0, ROWS)
        row = tl.load(order + 2 * even, mask=even < evens, other=0)
        row_lengths = lengths(gram, row, n, even < evens)
        least = tl.full([ROWS], float("inf"), tl.float32)
        at = tl.zeros([ROWS], tl.int32)
        for start in range(0, odds, COLS):
            odd = start + tl.arange(0, COLS)
            column = tl.load(order + 2 * odd + 1, mask=odd < odds, other=0)
            column_lengths = lengths(gram, column, n, odd < odds)
            inner = tl.load(gram + row[:, None] * n + column[None, :])
            cost = finite(-inner / (row_lengths[:, None] * column_lengths[None, :]))
            cost = tl.where((odd < odds)[None, :], cost, float("inf"))
            least, at = cheapest(cost, start, least, at)
        tl.store(keys + even, least, mask=even < evens)
        tl.store(partner + even, at, mask=even < evens)
    tl.debug_barrier()
    for first in range(0, evens, ROWS):
        even = first + tl.arange(0, ROWS)
        fused = ranks(keys, evens, even, COLS) < pairs
        tl.store(gone + even, fused.to(tl.int32), mask=even < evens)


@triton.jit
def _squared_distances(
    spread: tl.tensor, row: tl.tensor, column: tl.tensor, n: tl.tensor, scale: tl.tensor
) -> tl.tensor:
    """Between tokens at places R and C, R×C."""
    inner = tl.load(spread + row[:, None] * n + column[None, :])
    own = tl.load(spread + row * (n + 1))
    other = tl.load(spread + column * (n + 1))
    return tl.maximum(own[:, None] + other[None, :] - 2 * inner, 0.0) * scale


@triton.jit
def _density(
    spread: tl.tensor,
    order: tl.tensor,
    density: tl.tensor,
    n: tl.tensor,
    rest: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Logarithms of the densities: of sums whose largest term is followed from tile to tile."""
    for first in range(0, rest, ROWS):
        at = first + tl.arange(0, ROWS)
        row = tl.load(order + at, mask=at < rest, other=0)
        largest = tl.full([ROWS], _LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, rest, COLS):
            other = start + tl.arange(0, COLS)
            column = tl.load(order + other, mask=other < rest, other=0)
            squared = _squared_distances(spread, row, column, n, scale)
            real = (other < rest)[None, :] & (other[None, :] != at[:, None])
            exponent = tl.where(real, -squared, -float("inf"))
            before = largest
            largest = tl.maximum(before, tl.max(exponent, 1))
            total = total * tl.exp(before - largest)
            total += tl.sum(tl.exp(exponent - largest[:, None]), 1)
        tl.store(density + at, largest + tl.log(total / rest), mask=at < rest)


@triton.jit
def _scores(
    spread: tl.tensor,
    order: tl.tensor,
    density: tl.tensor,
    keys: tl.tensor,
    n: tl.tensor,
    rest: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """What makes tokens centers, as descending keys; see ``cluster_density_peaks``."""
    for first in range(0, rest, ROWS):
        at = first + tl.arange(0, ROWS)
        row = tl.load(order + at, mask=at < rest, other=0)
        mine = tl.load(density + at, mask=at < rest, other=0.0)
        nearest = tl.full([ROWS], float("inf"), tl.float32)
        for start in range(0, rest, COLS):
            other = start + tl.arange(0, COLS)
            column = tl.load(order + other, mask=other < rest, other=0)
            theirs = tl.load(density + other, mask=other < rest, other=-float("inf"))
            denser = theirs[None, :] > mine[:, None]
            earlier = other[None, :] < at[:, None]
            denser = denser | ((theirs[None, :] == mine[:, None]) & earlier)
            distance = tl.sqrt(_squared_distances(spread, row, column, n, scale))
            distance = tl.where(denser & (other < rest)[None, :], distance, float("inf"))
            nearest = tl.minimum(nearest, tl.min(distance, 1))
        _store_descending(keys, at, mine + tl.log(nearest), at < rest)


@triton.jit
def _nearest(
    spread: tl.tensor,
    order: tl.tensor,
    center: tl.tensor,
    at: tl.tensor,
    n: tl.tensor,
    rest: tl.tensor,
    clusters: tl.tensor,
    scale: tl.tensor,
    COLS: tl.constexpr,
) -> tl.tensor:
    """The center that is nearest to each token."""
    row = tl.load(order + at, mask=at < rest, other=0)
    least = tl.full(at.shape, float("inf"), tl.float32)
    label = tl.zeros_like(at)
    for start in range(0, clusters, COLS):
        k = start + tl.arange(0, COLS)
        peak = tl.load(center + k, mask=k < clusters, other=0)
        column = tl.load(order + peak, mask=k < clusters, other=0)
        distance = finite(tl.sqrt(_squared_distances(spread, row, column, n, scale)))
        distance = tl.where((k < clusters)[None, :], distance, float("inf"))
        least, label = cheapest(distance, start, least, label)
    return label
