"""Ward's linkage, all of its rounds or steps in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_lightning.errors import SettingError
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

#: Sources that are joined in one product.
_JOINED = 16


def ward_leaders(
    tokens: Tensor, keys: Tensor | None, weight: Tensor, keep: int, rounds: int | None
) -> Tensor:
    """:func:`tdm_lightning.ops.ward_leaders` of tokens and keys of unit length, side by side.

    Args:
        tokens: B×N×C, of any float type and any strides, of at most
            :data:`~tdm_lightning.ops.kernels.limits.MOST` tokens.
        keys: B×N×d, likewise; ``None``: only tokens are compared.
        weight: of each token, B×N, positive.
        keep: groups that are left.
        rounds: how many; ``None``: the exact agglomeration.

    Returns:
        The place of the token that leads each one's group, B×N, int64.

    Raises:
        ValueError: if the rounds cannot leave so few.
    """
    batch, n, _ = tokens.shape
    if rounds is not None and keep < (least := -(-n // 2**rounds)):
        raise SettingError(
            f"{rounds} rounds that each at most halve make at least {least} of {n} tokens, and"
            f" {keep} are asked for"
        )
    leader = torch.empty(batch, n, dtype=torch.int64, device=tokens.device)
    if not leader.numel():
        return leader
    gram = inner_products(tokens)
    given = (
        gram,
        gram if keys is None else inner_products(keys),
        weight.float().contiguous(),
        leader,
        scratch(tokens, 4, torch.float32),
    )
    shape = {
        "KEYS": keys is not None,
        "ROWS": ROWS,
        "COLS": columns(n),
        "WHOLE": whole(n),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
    with torch.cuda.device_of(tokens):
        if rounds is None:
            ints = scratch(tokens, 2, torch.int32)
            _agglomerate[(batch,)](*given, ints, n, keep, **shape)
        else:
            ints = scratch(tokens, 6, torch.int32)
            half = columns(n // 2)
            _in_rounds[(batch,)](*given, ints, n, keep, rounds, HALF=half, JOINED=_JOINED, **shape)
    return leader


@triton.jit(do_not_specialize=["n", "keep", "rounds"])
def _in_rounds(
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
    _measure(gram, inner, weight + image * n, floats, n, KEYS, WHOLE)
    tl.debug_barrier()
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        for start in range(0, n, COLS):
            column = start + tl.arange(0, COLS)
            mask = (row < n)[:, None] & (column < n)[None, :]
            sums = _sums(gram, inner, floats, row, column, n, KEYS)
            tl.store(gram + row[:, None] * n + column[None, :], sums, mask=mask)
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


@triton.jit(do_not_specialize=["n", "keep"])
def _agglomerate(
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
    _measure(cost, inner, weight + image * n, floats, n, KEYS, WHOLE)
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
def _measure(
    gram: tl.tensor,
    inner: tl.tensor,
    weight: tl.tensor,
    floats: tl.tensor,
    n: tl.tensor,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Into the four vectors of ``floats``: weights, squared lengths of the weighted features over
    the weights, lengths of the tokens and of the keys.
    """
    place = tl.arange(0, WHOLE)
    inside = place < n
    w = tl.load(weight + place, mask=inside, other=1.0)
    length = lengths(gram, place, n, inside)
    squared = tl.load(gram + place * (n + 1), mask=inside, other=0.0) / (length * length)
    tl.store(floats + 2 * n + place, length, mask=inside)
    if KEYS:
        length = lengths(inner, place, n, inside)
        squared += tl.load(inner + place * (n + 1), mask=inside, other=0.0) / (length * length)
        tl.store(floats + 3 * n + place, length, mask=inside)
    tl.store(floats + place, w, mask=inside)
    tl.store(floats + n + place, w * squared, mask=inside)


@triton.jit
def _sums(
    gram: tl.tensor,
    inner: tl.tensor,
    floats: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """Inner products of the weighted features of tokens at places R and C, R×C."""
    at = row[:, None] * n + column[None, :]
    real, other = row < n, column < n
    mask = real[:, None] & other[None, :]
    length = tl.load(floats + 2 * n + row, mask=real, other=1.0)[:, None]
    found = tl.load(gram + at, mask=mask, other=0.0)
    found /= length * tl.load(floats + 2 * n + column, mask=other, other=1.0)[None, :]
    if KEYS:
        length = tl.load(floats + 3 * n + row, mask=real, other=1.0)[:, None]
        second = tl.load(inner + at, mask=mask, other=0.0)
        found += second / (
            length * tl.load(floats + 3 * n + column, mask=other, other=1.0)[None, :]
        )
    w = tl.load(floats + row, mask=real, other=1.0)[:, None]
    return found * (w * tl.load(floats + column, mask=other, other=1.0)[None, :])


@triton.jit
def _costs(
    inner: tl.tensor, own: tl.tensor, other: tl.tensor, w: tl.tensor, v: tl.tensor
) -> tl.tensor:
    """What merging groups adds to the weighted variance, R×C.

    Args:
        inner: products of their weighted sums, R×C.
        own: squared length of the sums over the weight, R.
        other: likewise, C.
        w: weights, R.
        v: likewise, C.
    """
    w, v = w[:, None], v[None, :]
    return finite((own[:, None] * v + other[None, :] * w - 2 * inner) / (w + v))


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
            cost = _costs(inner, own, norm, w, v)
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
    sums = _sums(cost, inner, floats, row, column, n, KEYS)
    w = tl.load(floats + row, mask=row < n, other=1.0)
    v = tl.load(floats + column, mask=column < n, other=1.0)
    own = tl.load(floats + n + row, mask=row < n, other=0.0)
    norm = tl.load(floats + n + column, mask=column < n, other=0.0)
    price = tl.maximum(_costs(sums, own, norm, w, v), 0.0)
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
