"""ToMe: merge the most similar tokens, a few in every block."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

from tdm_lightning.core.tokens import Observed, Reduction, Role, Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.ops import match_alternating, merge_groups
from tdm_lightning.strategies.base import Dial, Strategy


class ToMe(Strategy):
    """Merges ``r`` tokens in every block, between attention and MLP (Bolya et al., "Token Merging",
    ICLR 2023).

    Patches at even positions of the sequence are matched with patches at odd ones by the cosine of
    their head-averaged keys; the r most similar are merged as means weighted by the number of
    patches they stand for. It needs no training and adds no parameter. The split by position makes
    it the one method here that does not commute with a permutation of the patches.

    Args:
        r: tokens to merge. An integer: as many in every block. A pair ``(r, inflection)``, its
            second number a float: r on average, from ``r·(1-inflection)`` in the first block
            linearly to ``r·(1+inflection)`` in the last, rounded down. A list: one number per
            block, 0 where it ends early. At most half of the patch tokens can be merged in one
            block; a larger r merges that half, as in the paper's code, so at least one token is
            left whatever r says.
        proportional_attention: add ``log(size)`` of each token to the logits of its key, so that a
            token attracts as much attention as the patches it stands for would (eq. 1).

    Raises:
        TypeError, ValueError: if ``r`` is of the wrong kind or negative.

    >>> ToMe((8, -1.0)).schedule(12)
    [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    """

    def __init__(
        self, r: int | list[int] | tuple[int, float] = 13, proportional_attention: bool = True
    ) -> None:
        super().__init__()
        self.r = _check_r(r)
        self.proportional_attention = bool(proportional_attention)

    def schedule(self, depth: int) -> list[int]:
        """Tokens to merge in each of ``depth`` blocks, before the limit of half of them."""
        if isinstance(self.r, int):
            return [self.r] * depth
        if isinstance(self.r, list):
            return (self.r + [0] * depth)[:depth]
        mean, inflection = self.r
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / max(1, depth - 1)
        return [int(first + step * index) for index in range(depth)]

    def dial(self, depth: int, patches: int) -> Dial:
        """The number of merges in all, spread over the blocks as evenly as whole numbers can be,
        the early blocks first.
        """
        most = depth * (patches // 2)

        def at(step: int) -> Strategy:
            each, more = divmod(most + 1 - step, depth)
            return self.changed(
                r=[each + (block < more) for block in range(depth)] if more else each
            )

        return Dial(most + 1, at)

    def needs(self, index: int) -> frozenset[str]:
        """Keys where something may be merged."""
        if isinstance(self.r, tuple):
            return frozenset({"keys"})
        merges = self.schedule(index + 1)[index] > 0
        return frozenset({"keys"}) if merges else frozenset()

    def tracks_size(self) -> bool:
        """The means are weighted by size."""
        return True

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """Merge."""
        pairs = min(self.schedule(tokens.depth)[index], tokens.count // 2)
        if pairs == 0:
            return tokens
        assert observed.keys is not None
        assert tokens.size is not None
        group, shared = match_alternating(observed.keys, pairs, tokens.prefix)
        left = tokens.count - pairs
        total = tokens.size.new_zeros(tokens.size.shape[0], left).scatter_add(1, group, tokens.size)
        merged = merge_groups(tokens.patches, group, tokens.size / total.gather(1, group), left)
        role = torch.where(shared, int(Role.MATCHED), int(Role.KEPT))
        tokens = tokens.reduced(index, Reduction(merged, group, role))
        return tokens.with_size_bias() if self.proportional_attention else tokens


def _check_r(r: Any) -> int | list[int] | tuple[int, float]:
    """One of the three forms, with plain numbers."""
    result: int | list[int] | tuple[int, float]
    if _whole(r):
        numbers, result = [r], int(r)
    elif not isinstance(r, Sequence) or isinstance(r, str) or not len(r):
        raise SettingTypeError(
            f"r must be an integer, a pair (r, inflection) or a list of integers, got {r!r}"
        )
    elif (
        len(r) == 2
        and _whole(r[0])
        and isinstance(r[1], Real)
        and (isinstance(r, tuple) or not _whole(r[1]))
    ):
        if not -1 <= float(r[1]) <= 1:
            raise SettingError(f"r's inflection must lie in [-1, 1], got {r[1]!r}")
        numbers, result = [r[0]], (int(r[0]), float(r[1]))
    elif all(_whole(number) for number in r):
        numbers, result = list(r), [int(number) for number in r]
    else:
        raise SettingTypeError(
            f"r must be an integer, a pair (r, inflection) or a list of integers, got {r!r}"
        )
    if min(numbers) < 0:
        raise SettingError(f"r counts tokens to merge and cannot be negative, got {r!r}")
    return result


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
