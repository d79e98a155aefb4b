"""Ward's linkage, all of its rounds or steps in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.ops.kernels.inner import inner_products
from tdm_lightning.ops.kernels.parts import ROWS, STAGES, WARPS, columns, scratch, whole
from tdm_lightning.ops.kernels.ward_exact import agglomerate
from tdm_lightning.ops.kernels.ward_rounds import in_rounds
from tdm_lightning.ops.merge import among, gather_tokens, joined
from tdm_lightning.ops.rounds import check_rounds

#: Sources that are joined in one product.
_JOINED = 16


def ward_plan(
    tokens: Tensor,
    keys: Tensor | None,
    weight: Tensor,
    keep: int,
    rounds: int | None,
    part: Tensor | None,
) -> Tensor:
    """The kernel of :func:`tdm_lightning.ops.ward_plan`."""
    if part is None:
        return joined(ward_leaders(tokens, keys, weight, keep, rounds))
    n = tokens.shape[1]
    tokens, weight = gather_tokens(tokens, part), weight.gather(1, part)
    keys = None if keys is None else gather_tokens(keys, part)
    return joined(among(ward_leaders(tokens, keys, weight, keep, rounds), part, n))


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
    if rounds is not None:
        check_rounds(n, keep, rounds)
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
            agglomerate[(batch,)](*given, ints, n, keep, **shape)
        else:
            ints = scratch(tokens, 6, torch.int32)
            half = columns(n // 2)
            in_rounds[(batch,)](*given, ints, n, keep, rounds, HALF=half, JOINED=_JOINED, **shape)
    return leader
