"""Gather tokens, combine groups of them, and spread them out again."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.ops.constants import places, rows
from tdm_lightning.ops.sums import group_extremes, group_totals, row_totals, running_totals


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by position.

    Args:
        x: tokens, B×N×C.
        index: positions in ``0…N-1``, B×M, int64.

    Returns:
        The picked tokens, B×M×C, in the order of ``index``.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> gather_tokens(x, torch.tensor([[2, 0]])).flatten().tolist()
    [3.0, 1.0]
    """
    batch, _, width = x.shape
    # Whole rows of a flat table: on a CPU some 50 times faster than `gather` with an index expanded
    # to C.
    table, step = _table(x)
    return table.index_select(0, _flat(index, step)).view(batch, index.shape[1], width)


def _table(x: Tensor) -> tuple[Tensor, int]:
    """Tokens of all images one below the other, R×C, and how many rows lie between two images.

    Patches behind prefix tokens are a slice, whose rows a copy would have to bring together; where
    no gradient is wanted their places are looked up in what they were sliced from.
    """
    batch, n, width = x.shape
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    if not plain or not width or (x.requires_grad and torch.is_grad_enabled()):
        return x.reshape(-1, width), n
    step, gap = divmod(x.stride(0), width)
    if batch > 1 and x.stride()[1:] == (width, 1) and not gap and step > n:
        return x.as_strided(((batch - 1) * step + n, width), (width, 1)), step
    return x.reshape(-1, width), n


def _flat(index: Tensor, n: int) -> Tensor:
    """Positions in a batch of sequences, B×M, as positions in their concatenation, B·M."""
    if index.shape[0] == 1:
        return index.flatten()
    return (index + rows(index.shape[0], n, index)).flatten()


def rank_order(importance: Tensor) -> Tensor:
    """Positions by descending importance, B×N → B×N int64, without gradient."""
    # A full top-k, not a sort: ONNX has no stable sort, and per row both cost the same.
    return importance.detach().topk(importance.shape[1], dim=1).indices


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``, B×N int64: the rank of every position."""
    rank = places(order.shape[1], order).expand_as(order)
    return torch.zeros_like(order).scatter_(1, order, rank)


def first_members(group: Tensor, groups: int, order: Tensor | None = None) -> Tensor:
    """The first member of every group.

    Args:
        group: the group of each token in ``0…groups-1``, B×N, int64; -1 for a token in none.
        groups: number of groups G.
        order: positions in the order that decides who is first, B×N; ``None``: as they stand.

    Returns:
        Positions, B×G, int64; that of some token for an empty group.

    >>> first_members(torch.tensor([[0, 1, 1, -1]]), 2, order=torch.tensor([[3, 2, 1, 0]])).tolist()
    [[0, 2]]
    """
    n = group.shape[1]
    here = places(n, group).expand_as(group)
    rank = here if order is None else inverse_order(order)
    slot = torch.where(group < 0, groups, group)
    first = group_extremes(rank, slot, groups + 1, "amin", n - 1)[:, :groups]
    return first if order is None else order.gather(1, first)


def joined(into: Tensor) -> Tensor:
    """Groups, from the token that each one joins.

    Args:
        into: position of the token that takes each one in, B×N, int64; its own for one that stays.

    Returns:
        The group of every token, B×N, int64, in the order of those that stay.

    >>> joined(torch.tensor([[2, 1, 2, 3]]))
    tensor([[1, 0, 1, 2]])
    """
    stays = into == places(into.shape[1], into)
    return (running_totals(stays) - 1).gather(1, into)


def among(into: Tensor, part: Tensor, n: int) -> Tensor:
    """What tokens that take part join, among all N, of which every other one joins itself.

    Args:
        into: the place, of those that take part, that each of them joins, B×P, int64.
        part: their places among all, B×P.
        n: number of all tokens N.

    Returns:
        The place that each token joins, B×N, int64; groups of them: :func:`joined`.

    >>> among(torch.tensor([[1, 1]]), torch.tensor([[0, 3]]), 4)
    tensor([[3, 1, 2, 3]])
    """
    here = places(n, part).expand(part.shape[0], -1)
    return here.scatter(1, part, part.gather(1, into))


def share_group(group: Tensor) -> Tensor:
    """Which tokens are not alone in their group, B×N, bool.

    Args:
        group: the group of each of N tokens in ``0…N-1``, B×N, int64.

    >>> share_group(torch.tensor([[1, 0, 1, 2]]))
    tensor([[ True, False,  True, False]])
    """
    return group_totals(torch.ones_like(group), group, group.shape[1]).gather(1, group) > 1


def mean_positions(
    group: Tensor, groups: int, position: Tensor, size: Tensor, columns: int
) -> Tensor:
    """The position on a grid that is nearest to the mean of each group's patches.

    Args:
        group: the group of each token in ``0…groups-1``, B×N, int64; -1 for a token in none.
        groups: number of groups G.
        position: where each token stands, counted along the rows of the grid, B×N, int64.
        size: patches that each token stands for, B×N.
        columns: width of the grid.

    Returns:
        Places, B×G, int64; the first of all for an empty group.

    >>> group, position = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 8, 5]])
    >>> mean_positions(group, 2, position, torch.ones(1, 3), columns=3).tolist()
    [[4, 5]]
    """
    slot = torch.where(group < 0, groups, group)
    parts = torch.stack((size, size * (position // columns), size * (position % columns)), dim=1)
    total = group_totals(parts, slot, groups + 1)
    row, column = (
        (total[:, 1:, :groups] / total[:, :1, :groups].clamp(min=1)).round().long().unbind(dim=1)
    )
    return row * columns + column


def merge_groups(x: Tensor, group: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Combine each group of tokens into one: ``out_g = Σ_{j∈g} w_j x_j``.

    Args:
        x: tokens, B×N×C.
        group: the group of each token in ``0…groups-1``, B×N, int64.
        weight: weight of each token, B×N.
        groups: number of groups G; an empty group gives a zero token.

    Returns:
        Combined tokens, B×G×C, in ``x``'s dtype.
    """
    batch, _, width = x.shape
    weighted = x * weight.to(x.dtype).unsqueeze(-1)
    out = row_totals(weighted.reshape(-1, width), _flat(group, groups), batch, groups)
    return out.view(batch, groups, width)


def unmerge(x: Tensor, source: Tensor) -> Tensor:
    """Give every original patch the feature of the token that now holds it.

    Args:
        x: surviving tokens without prefix tokens, B×M×C.
        source: the token that holds each patch, B×N0, int64; -1 where the patch was dropped.

    Returns:
        Dense features, B×N0×C; zero where the patch was dropped.
    """
    if x.shape[1] == 0:  # all patches were dropped
        return x.new_zeros(*source.shape, x.shape[2])
    dense = gather_tokens(x, source.clamp(min=0))
    return dense.masked_fill((source < 0).unsqueeze(-1), 0)
