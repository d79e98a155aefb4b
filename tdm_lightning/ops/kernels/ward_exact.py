"""The exact agglomeration by Ward's linkage, all of its steps in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from tdm_lightning.ops.kernels.parts import cheapest, finite
from tdm_lightning.ops.kernels.ward_costs import costs, measure, sums


@triton.jit(do_not_specialize=["n", "keep"])
def agglomerate(
    gram: tl.tensor,
    inner: tl.tensor,
    weight: tl.tensor,
    leader: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    n: tl.tensor,
    keep: tl.tensor,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One program: one image, its N² costs once, and in every step one row and one column of them,
    and again the rows whose cheapest partner was merged.
    """
    image = tl.program_id(0).to(tl.int64)
    cost = gram + image * n * n
    inner += image * n * n
    leader += image * n
    floats += image * 4 * n
    total = floats  # weights of the groups
    least = floats + 2 * n  # where the lengths are before
    partner = ints + image * 2 * n
    stale = partner + n

    place = tl.arange(0, WHOLE)
    inside = place < n
    measure(cost, inner, weight + image * n, floats, n, KEYS, WHOLE)
    tl.debug_barrier()
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        for start in range(0, n, COLS):
            column = start + tl.arange(0, COLS)
            _store_costs(cost, inner, floats, row, column, n, KEYS)
    tl.debug_barrier()
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        _least_of_rows(cost, row, row < n, least, partner, n, COLS)
    tl.debug_barrier()

    lead = place
    for _ in range(n - keep):
        known = tl.load(least + place, mask=inside, other=float("inf"))
        with_whom = tl.load(partner + place, mask=inside, other=0)
        price, i = tl.min(known, 0, return_indices=True, return_indices_tie_break_left=True)
        j = tl.load(partner + i)
        w = tl.load(total + place, mask=inside, other=1.0)
        w_i, w_j = tl.load(total + i), tl.load(total + j)
        to_i = tl.load(cost + i * n + place, mask=inside, other=float("inf"))
        to_j = tl.load(cost + j * n + place, mask=inside, other=float("inf"))
        joined = ((w_i + w) * to_i + (w_j + w) * to_j - w * price) / (w_i + w_j + w)
        live = (known < float("inf")) & (place != i) & (place != j)
        joined = tl.where(live, finite(joined), float("inf"))
        lost = live & ((with_whom == i) | (with_whom == j)) | (place == i)
        nearer = live & ((joined < known) | ((joined == known) & (i < with_whom)))
        tl.debug_barrier()  # all have read

        tl.store(cost + i * n + place, joined, mask=inside)
        tl.store(cost + place * n + i, joined, mask=inside)
        tl.store(cost + j * n + place, tl.full([WHOLE], float("inf"), tl.float32), mask=inside)
        tl.store(cost + place * n + j, tl.full([WHOLE], float("inf"), tl.float32), mask=inside)
        tl.store(total + i, w_i + w_j)
        tl.store(least + place, joined, mask=nearer)
        tl.store(partner + place, tl.zeros_like(place) + i, mask=nearer)
        tl.store(least + j, float("inf"))
        tl.store(stale + tl.cumsum(lost.to(tl.int32), 0) - 1, place, mask=lost)
        tl.debug_barrier()
        many = tl.sum(lost.to(tl.int32), 0)
        for first in range(0, many, ROWS):
            at = first + tl.arange(0, ROWS)
            row = tl.load(stale + at, mask=at < many, other=0)
            _least_of_rows(cost, row, at < many, least, partner, n, COLS)
        tl.debug_barrier()
        lead = tl.where(lead == j, i, lead)
    tl.store(leader + place, lead, mask=inside)


@triton.jit
def _store_costs(
    cost: tl.tensor,
    inner: tl.tensor,
    floats: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    KEYS: tl.constexpr,
) -> None:
    """The costs of pairs in place of the inner products: read above the diagonal, written on both
    sides of it, so that they are equal to the last bit.
    """
    mask = (row < n)[:, None] & (column < n)[None, :]
    products = sums(cost, inner, floats, row, column, n, KEYS)
    w = tl.load(floats + row, mask=row < n, other=1.0)
    v = tl.load(floats + column, mask=column < n, other=1.0)
    own = tl.load(floats + n + row, mask=row < n, other=0.0)
    norm = tl.load(floats + n + column, mask=column < n, other=0.0)
    price = tl.maximum(costs(products, own, norm, w, v), 0.0)
    above = mask & (row[:, None] < column[None, :])
    tl.store(cost + row[:, None] * n + column[None, :], price, mask=above)
    tl.store(cost + column[None, :] * n + row[:, None], price, mask=above)
    itself = mask & (row[:, None] == column[None, :])
    nothing = tl.full(price.shape, float("inf"), tl.float32)
    tl.store(cost + row[:, None] * n + column[None, :], nothing, mask=itself)


@triton.jit
def _least_of_rows(
    cost: tl.tensor,
    row: tl.tensor,
    mask: tl.tensor,
    least: tl.tensor,
    partner: tl.tensor,
    n: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    """The cheapest partner of each row, and its cost."""
    best = tl.full(row.shape, float("inf"), tl.float32)
    where = tl.zeros_like(row)
    for start in range(0, n, COLS):
        column = start + tl.arange(0, COLS)
        real = mask[:, None] & (column < n)[None, :]
        price = tl.load(cost + row[:, None] * n + column[None, :], mask=real, other=float("inf"))
        best, where = cheapest(price, start, best, where)
    tl.store(least + row, best, mask=mask)
    tl.store(partner + row, where, mask=mask)
