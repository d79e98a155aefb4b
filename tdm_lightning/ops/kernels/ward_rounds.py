"""The rounds of Ward's linkage, all of them in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from tdm_lightning.ops.kernels.parts import cheapest, ranks
from tdm_lightning.ops.kernels.ward_costs import costs, measure, sums


@triton.jit(do_not_specialize=["n", "keep", "rounds"])
def in_rounds(
    gram: tl.tensor,
    inner: tl.tensor,
    weight: tl.tensor,
    leader: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    n: tl.tensor,
    keep: tl.tensor,
    rounds: tl.tensor,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
    JOINED: tl.constexpr,
) -> None:
    """One program: one image, its N² inner products weighted once, and in every round a quarter of
    P² costs for P groups that are left, and two products with the rows that move.
    """
    image = tl.program_id(0).to(tl.int64)
    gram += image * n * n
    inner += image * n * n
    leader += image * n
    floats += image * 4 * n
    total = floats  # weights of the groups
    least = floats + n
    present = ints + image * 6 * n
    partner = present + n
    gone = partner + n
    source = gone + n
    target = source + n
    into = target + n

    place = tl.arange(0, WHOLE)
    tl.store(present + place, place, mask=place < n)
    tl.store(into + place, place, mask=place < n)
    measure(gram, inner, weight + image * n, floats, n, KEYS, WHOLE)
    tl.debug_barrier()
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        for start in range(0, n, COLS):
            column = start + tl.arange(0, COLS)
            mask = (row < n)[:, None] & (column < n)[None, :]
            products = sums(gram, inner, floats, row, column, n, KEYS)
            tl.store(gram + row[:, None] * n + column[None, :], products, mask=mask)
    tl.debug_barrier()

    left = n
    for number in range(rounds):
        later = rounds - 1 - number
        # As even as may be; but no more may be left than the later rounds can halve away.
        even = (left - keep) // (later + 1)
        count = tl.maximum(even, left - (keep << tl.minimum(later, 12)))
        if count > 0:
            odd = 1 - number % 2  # where the sources stand
            sources = (left + 1 - odd) // 2
            _propose(gram, total, present, least, partner, n, left, odd, ROWS, HALF)
            tl.debug_barrier()
            for first in range(0, sources, ROWS):
                at = first + tl.arange(0, ROWS)
                rank = ranks(least, sources, at, HALF)
                chosen = (at < sources) & (rank < count)
                mine = tl.load(present + 2 * at + odd, mask=at < sources, other=0)
                taker = tl.load(partner + at, mask=at < sources, other=0)
                tl.store(gone + at, chosen.to(tl.int32), mask=at < sources)
                tl.store(source + rank, mine, mask=chosen)
                tl.store(target + rank, taker, mask=chosen)
                tl.store(into + mine, taker, mask=chosen)
            tl.debug_barrier()
            if later > 0:
                _join(gram, source, target, count, n, n, 1, JOINED, COLS)
                _join_weights(total, source, target, count, ROWS, HALF)
                tl.debug_barrier()
                _join(gram, source, target, count, n, 1, n, JOINED, COLS)
                _leave(present, gone, left, odd, WHOLE)
                tl.debug_barrier()
            left -= count
    lead = place
    for _ in range(rounds):  # a token that took others in may have been taken in later
        lead = tl.load(into + lead, mask=place < n, other=0)
    tl.store(leader + place, lead, mask=place < n)


@triton.jit
def _propose(
    gram: tl.tensor,
    total: tl.tensor,
    present: tl.tensor,
    least: tl.tensor,
    partner: tl.tensor,
    n: tl.tensor,
    left: tl.tensor,
    odd: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """The cheapest target of each source, and its cost."""
    sources = (left + 1 - odd) // 2
    targets = left - sources
    for first in range(0, sources, ROWS):
        at = first + tl.arange(0, ROWS)
        row = tl.load(present + 2 * at + odd, mask=at < sources, other=0)
        w = tl.load(total + row)
        own = tl.load(gram + row * (n + 1)) / w
        best = tl.full([ROWS], float("inf"), tl.float32)
        where = tl.zeros([ROWS], tl.int32)
        for start in range(0, targets, COLS):
            other = start + tl.arange(0, COLS)
            column = tl.load(present + 2 * other + 1 - odd, mask=other < targets, other=0)
            v = tl.load(total + column)
            norm = tl.load(gram + column * (n + 1)) / v
            inner = tl.load(gram + row[:, None] * n + column[None, :])
            cost = costs(inner, own, norm, w, v)
            cost = tl.where((other < targets)[None, :], cost, float("inf"))
            best, where = cheapest(cost, start, best, where)
        tl.store(least + at, tl.maximum(best, 0.0), mask=at < sources)
        taker = tl.load(present + 2 * where + 1 - odd, mask=at < sources, other=0)
        tl.store(partner + at, taker, mask=at < sources)


@triton.jit
def _join(
    gram: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    count: tl.tensor,
    n: tl.tensor,
    along: tl.tensor,
    across: tl.tensor,
    JOINED: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Add the sources' rows to those of their targets, by products with matrices of zeros and ones.

    A target of several sources is written by the first of them, with the sum of all: no order of
    threads changes a result. Strides of n and 1 mean rows, of 1 and n columns.
    """
    for first in range(0, count, JOINED):
        k = first + tl.arange(0, JOINED)
        row = tl.load(target + k, mask=k < count, other=0)
        for start in range(0, n, COLS):
            column = start + tl.arange(0, COLS)
            inside = (column < n)[None, :]
            to = gram + row[:, None] * along + column[None, :] * across
            moved = tl.load(to, mask=(k < count)[:, None] & inside, other=0.0)
            earlier = tl.zeros([JOINED], tl.int32)
            for other in range(0, count, JOINED):
                q = other + tl.arange(0, JOINED)
                taker = tl.load(target + q, mask=q < count, other=-1)
                goes = tl.load(source + q, mask=q < count, other=0)
                same = row[:, None] == taker[None, :]
                earlier += tl.sum((same & (q[None, :] < k[:, None])).to(tl.int32), 1)
                rows = gram + goes[:, None] * along + column[None, :] * across
                values = tl.load(rows, mask=(q < count)[:, None] & inside, other=0.0)
                moved = tl.dot(same.to(tl.float32), values, moved, input_precision="ieee")
            tl.store(to, moved, mask=((k < count) & (earlier == 0))[:, None] & inside)


@triton.jit
def _join_weights(
    total: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    count: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Add the sources' weights to those of their targets, as :func:`_join`."""
    for first in range(0, count, ROWS):
        k = first + tl.arange(0, ROWS)
        row = tl.load(target + k, mask=k < count, other=0)
        joined = tl.load(total + row)
        earlier = tl.zeros([ROWS], tl.int32)
        for start in range(0, count, COLS):
            q = start + tl.arange(0, COLS)
            taker = tl.load(target + q, mask=q < count, other=-1)
            w = tl.load(total + tl.load(source + q, mask=q < count, other=0))
            same = row[:, None] == taker[None, :]
            joined += tl.sum(tl.where(same, w[None, :], 0.0), 1)
            earlier += tl.sum((same & (q[None, :] < k[:, None])).to(tl.int32), 1)
        tl.store(total + row, joined, mask=(k < count) & (earlier == 0))


@triton.jit
def _leave(
    present: tl.tensor, gone: tl.tensor, left: tl.tensor, odd: tl.tensor, WHOLE: tl.constexpr
) -> None:
    """Close the gaps that the chosen sources leave among those present."""
    at = tl.arange(0, WHOLE)
    is_source = (at < left) & (at % 2 == odd)
    stays = (at < left) & (tl.load(gone + at // 2, mask=is_source, other=0) == 0)
    here = tl.load(present + at, mask=at < left, other=0)
    to = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.debug_barrier()  # all have read
    tl.store(present + to, here, mask=stays)
