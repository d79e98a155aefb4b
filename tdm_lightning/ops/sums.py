"""Sums over the members of groups, by scattering; by matrix products in a graph that is exported.

What is exported may be meant for TensorRT, which adds nothing up while it scatters, and whose
running sums are of floating-point numbers (the table of operators of ``onnx/onnx-tensorrt``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tdm_lightning.ops.constants import zeros


def membership(group: Tensor, groups: int) -> Tensor:
    """Which tokens are in each group.

    Args:
        group: the group of each token in ``0…groups-1``, B×N, int64.
        groups: number of groups G.

    Returns:
        B×G×N, bool.

    >>> membership(torch.tensor([[1, 0, 1]]), 2).int().tolist()
    [[[0, 1, 0], [1, 0, 1]]]
    """
    return group.unsqueeze(1) == torch.arange(groups, device=group.device).unsqueeze(1)


def group_totals(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums over the members of each group.

    Args:
        values: of each token, B×N, or K of them, B×K×N.
        group: the group of each token in ``0…groups-1``, B×N, int64.
        groups: number of groups G.

    Returns:
        B×G or B×K×G.

    >>> group_totals(torch.ones(1, 3), torch.tensor([[1, 0, 1]]), groups=2)
    tensor([[1., 2.]])
    """
    several = values.ndim == 3
    if torch.compiler.is_exporting():
        table = values if several else values.unsqueeze(1)
        total = _product(table, membership(group, groups).transpose(1, 2))
        return total if several else total.squeeze(1)
    place = group.unsqueeze(1).expand_as(values) if several else group
    return values.new_zeros(*values.shape[:-1], groups).scatter_add_(-1, place, values)


def group_extremes(
    values: Tensor, group: Tensor, groups: int, rule: Literal["amin", "amax"], start: int
) -> Tensor:
    """The least or largest value of each group's members, B×G.

    Args:
        values: of each token, B×N.
        group: the group of each token in ``0…groups-1``, B×N, int64.
        groups: number of groups G.
        rule: the least, or the largest.
        start: that of an empty group; no value lies beyond it.

    >>> group_extremes(torch.tensor([[3, 5, 4]]), torch.tensor([[0, 0, 2]]), 3, "amax", 0).tolist()
    [[5, 0, 4]]
    """
    if torch.compiler.is_exporting():
        held = torch.where(membership(group, groups), values.unsqueeze(1), start)
        return held.amin(dim=2) if rule == "amin" else held.amax(dim=2)
    return values.new_full((values.shape[0], groups), start).scatter_reduce(1, group, values, rule)


def row_totals(x: Tensor, row: Tensor, batch: int, count: int, dim: int = 0) -> Tensor:
    """Sums of the rows of a table of all images that belong to the same row of a shorter one.

    Args:
        x: B·N rows in dimension ``dim``, image by image.
        row: of the shorter table, for each of them, B·N, int64; those of an image lie together.
        batch: number of images B.
        count: rows of each image in the shorter table.
        dim: 0 or 1.

    Returns:
        As ``x``, with B·count rows.

    >>> x, row = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([0, 0, 2, 3])
    >>> row_totals(x, row, batch=2, count=2).flatten().tolist()
    [3.0, 0.0, 3.0, 4.0]
    """
    if not torch.compiler.is_exporting():
        shape = [*x.shape]
        shape[dim] = batch * count
        return zeros(x, *shape).index_add(dim, row, x)
    table = x.movedim(dim, 0)
    rest = table.shape[1:]
    first = torch.arange(batch, device=row.device).unsqueeze(1) * count
    of = membership(row.view(batch, -1) - first, count)
    total = _product(of, table.reshape(batch, of.shape[2], -1))
    return total.reshape(batch * count, *rest).movedim(0, dim)


def add_at(x: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Add to some places of each row; no place is named twice.

    Args:
        x: B×N.
        place: B×P, int64.
        values: B×P.

    >>> add_at(torch.tensor([[1, 1, 1]]), torch.tensor([[2, 0]]), torch.tensor([[5, 7]])).tolist()
    [[8, 1, 6]]
    """
    if torch.compiler.is_exporting():
        return x.scatter(1, place, x.gather(1, place) + values)
    return x.scatter_add(1, place, values)


def add_at_(x: Tensor, place: Tensor, values: Tensor) -> None:
    """:func:`add_at`, in place."""
    if torch.compiler.is_exporting():
        x.copy_(add_at(x, place, values))
    else:
        x.scatter_add_(1, place, values)


def running_totals(values: Tensor) -> Tensor:
    """Sums of all values up to each one, of whole numbers below 2²⁴, B×N → B×N int64.

    >>> running_totals(torch.tensor([[True, False, True]])).tolist()
    [[1, 1, 2]]
    """
    if torch.compiler.is_exporting():
        return values.float().cumsum(dim=1).long()
    return values.cumsum(dim=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with a membership, in the dtype of the other one."""
    given = b if a.dtype == torch.bool else a
    dtype = given.dtype if given.is_floating_point() else torch.float32
    return (a.to(dtype) @ b.to(dtype)).to(given.dtype)
