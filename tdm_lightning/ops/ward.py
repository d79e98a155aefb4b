"""Ward's linkage: which tokens to merge so that their weighted variance grows least."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.errors import ReductionError
from tdm_lightning.ops.constants import places
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.kernels.limits import too_many
from tdm_lightning.ops.merge import among, gather_tokens, joined
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.ops.rounds import pairs_per_round
from tdm_lightning.ops.sides import join_sides
from tdm_lightning.ops.sums import row_totals


@torch.no_grad()
def ward_groups(features: Tensor, weight: Tensor, keep: int, rounds: int | None = 4) -> Tensor:
    """Group tokens by Ward's linkage, the costs followed on the Gram matrix of their sums.

    A merge of groups i and j costs ``w_i·w_j / (w_i + w_j) · ‖f_i − f_j‖²``: what it adds to the
    weighted variance (Ward, 1963). In a round the tokens at every other place each propose to the
    cheapest of those between, the cheapest proposals are accepted, and the sides change from round
    to round. Ties go to the lowest place.

    Args:
        features: what is compared, B×N×D.
        weight: of each token, B×N, positive.
        keep: groups that are left.
        rounds: how many; ``None``: the exact agglomeration, one cheapest pair of all at a time, for
            studies: it takes N − ``keep`` steps.

    Returns:
        The group of every token in ``0…keep-1``, B×N, int64, in the order of the places of those
        that took others in or are alone.

    Raises:
        ValueError: if the rounds cannot leave so few, or features are not finite; that is looked
            for on a CPU, outside of graphs.

    >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
    >>> ward_groups(points, torch.ones(1, 4), keep=2, rounds=1).tolist()
    [[0, 0, 1, 1]]
    """
    with full_precision(features.device):
        features, weight = features.float(), weight.float()
        if rounds is None:
            return joined(_agglomerate(features, weight, keep))
        pairs = pairs_per_round(weight.shape[1], keep, rounds)
        return _in_rounds(features, weight, pairs)


@torch.no_grad()
def ward_leaders(features: Tensor, weight: Tensor, keep: int, rounds: int | None = 4) -> Tensor:
    """As :func:`ward_groups`, but the place of the token that leads each one's group: its own where
    it took others in or is alone; B×N, int64.

    >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
    >>> ward_leaders(points, torch.ones(1, 4), keep=2, rounds=1).tolist()
    [[0, 0, 2, 2]]
    """
    with full_precision(features.device):
        features, weight = features.float(), weight.float()
        if rounds is None:
            return _agglomerate(features, weight, keep)
        pairs = pairs_per_round(weight.shape[1], keep, rounds)
        return _in_rounds(
            features, weight, pairs, places(weight.shape[1], weight).expand_as(weight)
        )


@in_two_forms(
    "tdm_lightning.ops.kernels.ward:ward_plan",
    lambda tokens, keys, weight, keep, rounds, part: too_many(tokens.shape[1]),
)
def ward_plan(
    tokens: Tensor,
    keys: Tensor | None,
    weight: Tensor,
    keep: int,
    rounds: int | None,
    part: Tensor | None,
) -> Tensor:
    """:func:`ward_groups` of tokens and keys, each of unit length and side by side, in two forms.

    Args:
        tokens: B×N×C.
        keys: B×N×d; ``None``: the tokens alone are compared.
        weight: of each token, B×N, positive.
        keep: groups that are left, of those that take part.
        rounds: how many; ``None``: the exact agglomeration.
        part: places of the tokens that take part, ascending, B×P; every other one is a group of its
            own. ``None``: all.

    Returns:
        The group of every token in ``0…keep+N-P-1``, B×N, int64, as :func:`ward_groups`.

    Raises:
        ValueError: as :func:`ward_groups`.
    """
    n = tokens.shape[1]
    if part is not None:
        tokens, weight = gather_tokens(tokens, part), weight.gather(1, part)
        keys = None if keys is None else gather_tokens(keys, part)
    sides = [tokens] if keys is None else [tokens, keys]
    unit = torch.cat([F.normalize(side.float(), dim=-1) for side in sides], dim=-1)
    if part is None:
        return ward_groups(unit, weight, keep, rounds)
    return joined(among(ward_leaders(unit, weight, keep, rounds), part, n))


def _in_rounds(
    features: Tensor, weight: Tensor, pairs: list[int], leader: Tensor | None = None
) -> Tensor:
    """The group of each token, or what the one that leads it has in ``leader``, B×N.

    Followed are the weighted sums of the groups, not their means: a merge adds their rows and
    columns of the Gram matrix. What is left stands side by side after each round, so that the two
    sides of the next one are slices.
    """
    gram = _gram_of_sums(features, weight)
    group: Tensor | None = None  # rows in a table of all images
    for number, count in enumerate(pairs):
        if not count:
            continue
        last, first = number == len(pairs) - 1, (number + 1) % 2
        n, left = weight.shape[1], weight.shape[1] - count
        source, target = slice(first, None, 2), slice(1 - first, None, 2)
        best, partner = _gains(gram, weight, source, target).max(dim=2)  # the first of equals
        gains, order = _largest_first(best)
        if group is None:
            _check_finite(gains[:, 0], features)
        order = order[:, :count]
        step = 0 if last and leader is None else left
        row = join_sides(order, partner, n, first, step).flatten()
        group = row if group is None else row.index_select(0, group)
        if leader is not None:
            leader = leader.clone()
            leader[:, source].scatter_(1, order, 0)
            leader = _added(leader, row, left)
        if not last:
            weight, gram = _added(weight, row, left), _added(gram, row, left)
            gram = _added(gram.transpose(1, 2), row, left)
    if group is None:
        return places(features.shape[1], weight).expand(features.shape[:2])
    if leader is not None:
        group = leader.flatten().index_select(0, group)
    return group.view(features.shape[:2])


def _added(x: Tensor, row: Tensor, left: int) -> Tensor:
    """Sums of what belongs to the same row of a table, B×N×…, for each of the images."""
    batch, _, *rest = x.shape
    return row_totals(x.flatten(0, 1), row, batch, left).view(batch, left, *rest)


def _largest_first(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values that are not positive in descending order, equal ones by place, and their places."""
    if not torch.compiler.is_exporting():
        return values.sort(dim=1, descending=True, stable=True)
    # ONNX has no stable sort; in double precision there is room below a float's last bit to tell
    # equal values apart.
    n = values.shape[1]
    shift = 1 + torch.arange(n, device=values.device, dtype=torch.float64) * 2.0**-40
    return ((values.clamp(max=0).double() - 1e-60) * shift).topk(n, dim=1)


def _check_finite(gains: Tensor, features: Tensor) -> None:
    """Whether gains are numbers, one of each image that is none where any was, B."""
    on_cpu = type(gains) is Tensor and gains.device.type == "cpu"
    if not on_cpu or torch.compiler.is_compiling() or not any(map(math.isnan, gains.tolist())):
        return
    finite = features.sum(dim=-1).isfinite()
    raise ReductionError(
        f"the features of {int((~finite).sum())} of {finite.numel()} tokens are not finite;"
        " look for the block or the image that they come from"
    )


def _gram_of_sums(features: Tensor, weight: Tensor) -> Tensor:
    """Inner products of the weighted features, B×N×N."""
    sums = features * weight.unsqueeze(2)
    return sums @ sums.transpose(1, 2)


def _gains(gram: Tensor, weight: Tensor, first: slice, second: slice) -> Tensor:
    """Minus a half of what merging each pair adds to the weighted variance, B×P×Q, but for rounding
    not positive: ``(S·T − ½(v·S²/w + w·T²/v)) / (w + v)`` of weighted sums S and T.

    Args:
        gram: of the weighted sums, B×N×N.
        weight: B×N.
        first: places of P tokens.
        second: places of Q tokens.
    """
    diagonal = gram.flatten(1)[:, :: gram.shape[1] + 1]  # see _squared_distances in clusters
    norm = diagonal / weight
    own, w = (values[:, first].unsqueeze(2) for values in (norm, weight))
    other, v = (values[:, second].unsqueeze(1) for values in (norm, weight))
    inner = gram[:, first, second].addcmul(own, v, value=-0.5)
    return inner.addcmul_(other, w, value=-0.5).div_(w + v)


def _agglomerate(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Merge the cheapest pair of all until ``keep`` are left, by the update of Lance and Williams
    (1967); the higher place goes into the lower one. The places of those that lead, B×N.
    """
    batch, n = weight.shape
    here = torch.arange(n, device=weight.device)
    leader = here.expand(batch, n)
    every = slice(None)
    cost = -2 * _gains(_gram_of_sums(features, weight), weight, every, every).clamp(max=0)
    _check_finite(cost.flatten(1).amin(dim=1), features)
    cost = cost.triu(1) + cost.triu(1).transpose(1, 2)  # the same both ways, to the last bit
    cost = cost.masked_fill(torch.eye(n, dtype=torch.bool, device=cost.device), torch.inf)
    for _ in range(n - keep):
        least, at = cost.flatten(1).min(dim=1, keepdim=True)
        i, j = at // n, at % n
        w_i, w_j = weight.gather(1, i), weight.gather(1, j)
        to_i, to_j = (gather_tokens(cost, place).squeeze(1) for place in (i, j))
        joined = (w_i + weight) * to_i + (w_j + weight) * to_j - weight * least
        joined = joined / (w_i + w_j + weight)
        is_i, is_j = here == i, here == j
        joined = joined.masked_fill(is_i | is_j, torch.inf)
        cost = torch.where(is_i.unsqueeze(2), joined.unsqueeze(1), cost)
        cost = torch.where(is_i.unsqueeze(1), joined.unsqueeze(2), cost)
        cost = cost.masked_fill(is_j.unsqueeze(1) | is_j.unsqueeze(2), torch.inf)
        weight = torch.where(is_i, w_i + w_j, weight)
        leader = torch.where(leader == j, i, leader)
    return leader
