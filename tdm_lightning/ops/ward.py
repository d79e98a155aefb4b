"""Ward's linkage: which tokens to merge so that their weighted variance grows least."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.errors import SettingError
from tdm_lightning.ops.merge import gather_tokens, merge_groups
from tdm_lightning.ops.precision import full_precision


def pairs_per_round(n: int, keep: int, rounds: int) -> list[int]:
    """How many of ``n`` tokens each round merges away; as equal as may be, as each at most halves.

    Raises:
        ValueError: if the rounds cannot reach ``keep``; it names the least that they can.

    >>> pairs_per_round(196, 138, 4)
    [14, 14, 15, 15]
    """
    if keep < (least := fewest_after(n, rounds)):
        raise SettingError(
            f"{rounds} rounds that each at most halve make at least {least} of {n} tokens, and"
            f" {keep} are asked for"
        )
    pairs = []
    for later in range(rounds - 1, -1, -1):
        fewer = (n - keep) // (later + 1)
        while fewest_after(n - fewer, later) > keep:
            fewer += 1
        pairs.append(fewer)
        n -= fewer
    return pairs


def fewest_after(n: int, rounds: int) -> int:
    """How few of ``n`` tokens rounds can leave that each at most halve.

    >>> fewest_after(196, 4)
    13
    """
    for _ in range(rounds):
        n -= n // 2
    return n


@torch.no_grad()
def ward_groups(
    features: Tensor, weight: Tensor, keep: int, rounds: int | None = 4
) -> tuple[Tensor, Tensor]:
    """Group tokens by Ward's linkage, the costs followed on their Gram matrix.

    A merge of groups i and j costs ``w_i·w_j / (w_i + w_j) · ‖f_i − f_j‖²``: what it adds to the
    weighted variance (Ward, 1963). In a round the tokens at every other place each propose to the
    cheapest of those between, the cheapest proposals are accepted, and the sides change from round
    to round. Ties go to the lowest place. The features are read once: with A the weighted groups of
    a round, their Gram matrix becomes ``A·G·Aᵀ``.

    Args:
        features: what is compared, B×N×D.
        weight: of each token, B×N, positive.
        keep: groups that are left.
        rounds: how many; ``None``: the exact agglomeration, one cheapest pair of all at a time, for
            studies: it takes N − ``keep`` steps.

    Returns:
        The group of every token in ``0…keep-1``, B×N, int64, in the order of the places of the
        tokens that took the others in; and these places, B×``keep``.

    Raises:
        ValueError: if the rounds cannot leave so few.

    >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
    >>> ward_groups(points, torch.ones(1, 4), keep=2, rounds=1)[0].tolist()
    [[0, 0, 1, 1]]
    """
    with full_precision(features.device):
        features, weight = features.float(), weight.float()
        gram = features @ features.transpose(1, 2)
        if rounds is None:
            return _agglomerate(gram, weight, keep)
        batch, n = weight.shape
        place = torch.arange(n, device=weight.device).expand(batch, n)
        group = place
        for number, pairs in enumerate(pairs_per_round(n, keep, rounds)):
            if pairs:
                joined, stays = _round(gram, weight, pairs, odd=number % 2 == 0)
                gram, weight, place = _merged(gram, weight, place, joined, stays)
                group = joined.gather(1, group)
        return group, place


def ward_cost(gram: Tensor, weight: Tensor) -> Tensor:
    """What merging each pair adds to the weighted variance, B×N×N."""
    norm = gram.diagonal(dim1=1, dim2=2)
    distance = (norm.unsqueeze(2) + norm.unsqueeze(1) - 2 * gram).clamp(min=0)
    return distance * _reduced_mass(weight.unsqueeze(2), weight.unsqueeze(1))


def _reduced_mass(first: Tensor, second: Tensor) -> Tensor:
    return first * second / (first + second)


def _round(gram: Tensor, weight: Tensor, pairs: int, odd: bool) -> tuple[Tensor, Tensor]:
    """One round.

    Args:
        gram: of the features, B×N×N.
        weight: B×N.
        pairs: proposals that are accepted.
        odd: whether those at odd places propose.

    Returns:
        The group of every token, B×N, and the places of those that stay, B×(N-pairs).
    """
    batch, n = weight.shape
    source, target = int(odd), int(not odd)
    norm = gram.diagonal(dim1=1, dim2=2)
    first, second = norm[:, source::2].unsqueeze(2), norm[:, target::2].unsqueeze(1)
    distance = (first + second - 2 * gram[:, source::2, target::2]).clamp(min=0)
    cost = distance * _reduced_mass(
        weight[:, source::2].unsqueeze(2), weight[:, target::2].unsqueeze(1)
    )
    best = cost.amin(dim=2)
    here = torch.arange(cost.shape[2], device=cost.device)
    partner = torch.where(cost == best.unsqueeze(2), here, cost.shape[2] - 1).amin(dim=2)
    goes = torch.zeros(batch, n, dtype=torch.bool, device=gram.device)
    goes[:, source::2] = _rank(best) < pairs
    stays = _true_places(~goes, n - pairs)
    rank = (~goes).cumsum(dim=1) - 1
    joined = rank.clone()
    joined[:, source::2] = torch.where(
        goes[:, source::2], rank[:, target::2].gather(1, partner), rank[:, source::2]
    )
    return joined, stays


def _rank(values: Tensor) -> Tensor:
    """The rank of each value in its row, from 0, ties by place; B×N."""
    n = values.shape[1]
    before = torch.ones(n, n, dtype=torch.bool, device=values.device).tril(-1)
    mine, other = values.unsqueeze(2), values.unsqueeze(1)
    return ((other < mine) | ((other == mine) & before)).sum(dim=2)


def _true_places(mask: Tensor, count: int) -> Tensor:
    """The places of the ``count`` true values of each row, in their order, B×``count``."""
    n = mask.shape[1]
    here = torch.arange(n, device=mask.device)
    return torch.where(mask, here, n).topk(count, dim=1, largest=False, sorted=True).indices


def _merged(
    gram: Tensor, weight: Tensor, place: Tensor, joined: Tensor, stays: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, weights and places of the groups."""
    count = stays.shape[1]
    total = weight.new_zeros(weight.shape[0], count).scatter_add(1, joined, weight)
    share = weight / total.gather(1, joined)
    rows = merge_groups(gram, joined, share, count)
    gram = merge_groups(rows.transpose(1, 2), joined, share, count)
    return gram, total, place.gather(1, stays)


def _agglomerate(gram: Tensor, weight: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Merge the cheapest pair of all until ``keep`` are left, by the update of Lance and Williams
    (1967); the higher place goes into the lower one.
    """
    batch, n = weight.shape
    cost = ward_cost(gram, weight)
    here = torch.arange(n, device=gram.device)
    cost = cost.masked_fill(here.unsqueeze(0) <= here.unsqueeze(1), torch.inf)  # j < i alone
    cost = torch.minimum(cost.transpose(1, 2), cost)
    leader = here.expand(batch, n)
    alive = torch.ones(batch, n, dtype=torch.bool, device=gram.device)
    for _ in range(n - keep):
        flat = cost.flatten(1)
        least = flat.amin(dim=1, keepdim=True)
        at = torch.where(flat == least, torch.arange(n * n, device=gram.device), n * n).amin(dim=1)
        i, j = (at // n).unsqueeze(1), (at % n).unsqueeze(1)
        i, j = torch.minimum(i, j), torch.maximum(i, j)
        to_i, to_j = (_row(cost, k) for k in (i, j))
        w_i, w_j = weight.gather(1, i), weight.gather(1, j)
        new = (w_i + weight) * to_i + (w_j + weight) * to_j - weight * least
        new = new / (w_i + w_j + weight)
        alive = alive & (here != j)
        new = torch.where(alive & (here != i), new, torch.inf)
        at_i, at_j = here == i, here == j
        gone = at_j.unsqueeze(1) | at_j.unsqueeze(2)
        cost = torch.where(at_i.unsqueeze(2), new.unsqueeze(1), cost)
        cost = torch.where(at_i.unsqueeze(1), new.unsqueeze(2), cost).masked_fill(gone, torch.inf)
        weight = torch.where(at_i, w_i + w_j, weight)
        leader = torch.where(leader == j, i, leader)
    rank = alive.cumsum(dim=1) - 1
    return rank.gather(1, leader), _true_places(alive, keep)


def _row(matrix: Tensor, index: Tensor) -> Tensor:
    """One row of each matrix of a batch, B×N; ``index`` is B×1."""
    return gather_tokens(matrix, index).squeeze(1)
