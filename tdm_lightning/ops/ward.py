"""Ward's linkage: which tokens to merge so that their weighted variance grows least."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.errors import ReductionError, SettingError
from tdm_lightning.ops.constants import places
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.kernels.limits import too_many
from tdm_lightning.ops.merge import gather_tokens
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
def ward_leaders(features: Tensor, weight: Tensor, keep: int, rounds: int | None = 4) -> Tensor:
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
        The place of the token that leads each one's group, its own where it took others in or is
        alone, B×N, int64; groups of them: :func:`~tdm_lightning.ops.joined`.

    Raises:
        ValueError: if the rounds cannot leave so few.

    >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
    >>> ward_leaders(points, torch.ones(1, 4), keep=2, rounds=1).tolist()
    [[0, 0, 2, 2]]
    """
    with full_precision(features.device):
        features, weight = features.float(), weight.float()
        if rounds is None:
            return _agglomerate(features, weight, keep)
        pairs = pairs_per_round(weight.shape[1], keep, rounds)
        return _in_rounds(features, weight, pairs)


@in_two_forms(
    "tdm_lightning.ops.kernels.ward:ward_leaders",
    lambda tokens, keys, weight, keep, rounds: too_many(tokens.shape[1]),
)
def ward_joins(
    tokens: Tensor, keys: Tensor | None, weight: Tensor, keep: int, rounds: int | None
) -> Tensor:
    """:func:`ward_leaders` of tokens and keys, each of unit length and side by side, in two forms.

    Args:
        tokens: B×N×C.
        keys: B×N×d; ``None``: the tokens alone are compared.
        weight: of each token, B×N, positive.
        keep: groups that are left.
        rounds: how many; ``None``: the exact agglomeration.

    Returns:
        As :func:`ward_leaders`.

    Raises:
        ValueError: if the rounds cannot leave so few, or features are not finite; that is looked
            for on a CPU, outside of graphs.
    """
    parts = [tokens] if keys is None else [tokens, keys]
    unit = torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)
    on_cpu = type(unit) is Tensor and unit.device.type == "cpu"
    looked_at = on_cpu and not torch.compiler.is_compiling()
    if looked_at and not math.isfinite(float(unit.sum())):  # of unit vectors: cannot overflow
        finite = unit.sum(dim=-1).isfinite()
        raise ReductionError(
            f"the features of {int((~finite).sum())} of {finite.numel()} tokens are not finite;"
            " look for the block or the image that they come from"
        )
    return ward_leaders(unit, weight, keep, rounds)


def _in_rounds(features: Tensor, weight: Tensor, pairs: list[int]) -> Tensor:
    """The place of the token that took each one in, B×N.

    Followed are the weighted sums of the groups, not their means: a merge adds their rows and
    columns of the Gram matrix, and nothing else changes.
    """
    gram = _gram_of_sums(features, weight)
    here = places(weight.shape[1], weight).expand_as(weight)
    leader = present = here
    for number, count in enumerate(pairs):
        if not count:
            continue
        odd = number % 2 == 0
        sources, targets = present[:, int(odd) :: 2], present[:, int(not odd) :: 2]
        cost = _costs(gram, weight, sources, targets)
        best, partner = cost.min(dim=2)  # the first of equals
        order = _cheapest_first(best.clamp(min=0))
        chosen = order[:, :count]
        source = sources.gather(1, chosen)
        target = targets.gather(1, partner.gather(1, chosen))
        leader = here.scatter(1, source, target).gather(1, leader)
        if number == len(pairs) - 1:
            break
        _join_(gram, source, target)
        weight = weight.scatter_add(1, target, weight.gather(1, source))
        left = torch.cat((targets, sources.gather(1, order[:, count:])), dim=1)
        present = left.sort(dim=1).values
    return leader


def _cheapest_first(values: Tensor) -> Tensor:
    """The places of non-negative values in ascending order, equal ones by place, B×N."""
    if not torch.compiler.is_exporting():
        return values.sort(dim=1, stable=True).indices
    # ONNX has no stable sort; in double precision there is room below a float's last bit to tell
    # equal values apart.
    n = values.shape[1]
    shift = 1 + torch.arange(n, device=values.device, dtype=torch.float64) * 2.0**-40
    return ((values.double() + 1e-60) * shift).topk(n, dim=1, largest=False).indices


def _gram_of_sums(features: Tensor, weight: Tensor) -> Tensor:
    """Inner products of the weighted features, B×N×N."""
    sums = features * weight.unsqueeze(2)
    return sums @ sums.transpose(1, 2)


def _costs(gram: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What merging each pair adds to the weighted variance, B×P×Q, but for rounding not negative.

    Args:
        gram: of the weighted sums, B×N×N.
        weight: B×N.
        first: places, B×P.
        second: places, B×Q.
    """
    at = torch.add(second.unsqueeze(1), first.unsqueeze(2), alpha=weight.shape[1])
    inner = gram.flatten(1).gather(1, at.flatten(1)).view_as(at)
    # w·v / (w + v) · ‖S/w − T/v‖² of sums S and T
    norm = gram.diagonal(dim1=1, dim2=2) / weight
    own, other = norm.gather(1, first).unsqueeze(2), norm.gather(1, second).unsqueeze(1)
    w, v = weight.gather(1, first).unsqueeze(2), weight.gather(1, second).unsqueeze(1)
    return inner.mul_(-2).addcmul_(own, v).addcmul_(other, w).div_(w + v)


def _join_(gram: Tensor, source: Tensor, target: Tensor) -> None:
    """Add rows and columns of the sources to those of their targets; their own are left as they
    are and not looked at again.
    """
    rows = source.unsqueeze(2).expand(-1, -1, gram.shape[2])
    gram.scatter_add_(1, target.unsqueeze(2).expand_as(rows), gram.gather(1, rows))
    columns = source.unsqueeze(1).expand(-1, gram.shape[1], -1)
    gram.scatter_add_(2, target.unsqueeze(1).expand_as(columns), gram.gather(2, columns))


def _agglomerate(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Merge the cheapest pair of all until ``keep`` are left, by the update of Lance and Williams
    (1967); the higher place goes into the lower one. As :func:`_in_rounds`.
    """
    batch, n = weight.shape
    here = torch.arange(n, device=weight.device)
    leader = here.expand(batch, n)
    cost = _costs(_gram_of_sums(features, weight), weight, leader, leader).clamp(min=0)
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
