"""In which blocks tokens are given up, and how many stay: the second part of a reduction."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Generic, Literal, TypeVar

from tdm_lightning.core.checks import (
    check_choice,
    check_counts,
    check_keep_rate,
    check_layers,
    check_layers_exist,
    check_number,
)
from tdm_lightning.core.configurable import Configurable
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.errors import SettingError, SettingTypeError

T = TypeVar("T")


@dataclass(frozen=True)
class SearchSpace(Generic[T]):
    """The settings among which one is searched that meets a compute budget.

    Attributes:
        size: how many settings there are.
        candidate: setting 1…``size``; none costs less than the one before it, and the last costs
            most.
    """

    size: int
    candidate: Callable[[int], T]

    def map(self, function: Callable[[T], Any]) -> SearchSpace[Any]:
        """The same space of something made of each setting."""
        return SearchSpace(self.size, lambda step: function(self.candidate(step)))


class Schedule(Configurable, ABC):
    """In which blocks tokens are given up, and how many stay. Has no state.

    Subclasses store every ``__init__`` argument under its own name.
    """

    @abstractmethod
    def reduces(self, index: int, depth: int) -> bool:
        """Whether block ``index`` of ``depth`` may give up tokens."""

    @abstractmethod
    def keep(self, index: int, count: int, info: ModelInfo, rate: float | None = None) -> int:
        """How many tokens stay.

        Args:
            index: the block, from 0.
            count: patch tokens that are there.
            info: the model; ``info.patches`` tokens entered its first block.
            rate: keep rate to use in place of the schedule's own while that is annealed.

        Returns:
            From 1 to ``count``; ``count`` where the block does not reduce.
        """

    def check(self, info: ModelInfo) -> None:
        """Refuse a model that the schedule does not fit.

        Raises:
            ValueError: if it does not.
        """

    def search_space(self, depth: int, patches: int) -> SearchSpace[Schedule] | None:
        """What to set to meet a compute budget; ``None`` (the default): nothing."""
        return None


class RateAtBlocks(Schedule):
    """A share of the tokens stays in each of some blocks.

    Args:
        keep_rate: the share, in (0, 1].
        layers: the blocks, counted from 0, or ``"all"``: a constant rate in every block.
        of: ``"present"``: of N tokens that enter such a block ``ceil(keep_rate·N)`` stay (EViT,
            TDM); ``"initial"``: after the s-th of them ``int(keep_rate^s·N0)`` of the N0 initial
            ones are left (DynamicViT and its kin).

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] | Literal["all"] = (3, 6, 9),
        of: Literal["present", "initial"] = "present",
    ) -> None:
        self.keep_rate = check_keep_rate(keep_rate)
        self.layers: tuple[int, ...] | Literal["all"] = (
            "all" if layers == "all" else check_layers(layers)
        )
        self.of = check_choice(of, ("present", "initial"), "of")

    def reduces(self, index: int, depth: int) -> bool:
        """See :meth:`Schedule.reduces`."""
        return self.layers == "all" or index in self.layers

    def keep(self, index: int, count: int, info: ModelInfo, rate: float | None = None) -> int:
        """See :meth:`Schedule.keep`.

        Raises:
            ValueError: if none of the initial tokens would be left.
        """
        if not self.reduces(index, info.depth):
            return count
        rate = annealed(self.keep_rate, rate)
        if self.of == "present":
            return min(count, math.ceil(rate * count))
        stage = index + 1 if self.layers == "all" else self.layers.index(index) + 1
        return min(count, self.left_after(stage, info.patches, rate))

    def left_after(self, stage: int, initial: int, rate: float | None = None) -> int:
        """Tokens left of ``initial`` after ``stage`` (from 1), where shares are of those.

        Raises:
            ValueError: if none is left.
        """
        rate = annealed(self.keep_rate, rate)
        left = int(initial * rate**stage)
        if left < 1:
            layer = stage - 1 if self.layers == "all" else self.layers[stage - 1]
            raise SettingError(
                f"keep_rate={rate} leaves no token at layer {layer}:"
                f" int({initial}·{rate}^{stage}) = 0; raise the keep rate or reduce in fewer layers"
            )
        return left

    def check(self, info: ModelInfo) -> None:
        """See :meth:`Schedule.check`: the blocks exist, and each leaves a token.

        Raises:
            ValueError: if not.
        """
        if self.layers != "all":
            check_layers_exist(self.layers, info.depth)
        if self.of == "initial":
            for index in range(info.depth):
                self.keep(index, info.patches, info)

    def search_space(self, depth: int, patches: int, size: int = 1000) -> SearchSpace[Schedule]:
        """The keep rates from ``1/size`` to 1."""
        return SearchSpace(size, lambda step: RateAtBlocks(step / size, self.layers, self.of))


class FewerPerBlock(Schedule):
    """Every block merges ``r`` tokens away (ToMe).

    At most half of the tokens go in one block; a larger r takes that half, as in the paper's code,
    so at least one token is left whatever r says.

    Args:
        r: an integer: as many in every block. A pair ``(r, inflection)``, its second number a
            float: r on average, from ``r·(1-inflection)`` in the first block linearly to
            ``r·(1+inflection)`` in the last, rounded down. A list: one number per block, 0 where it
            ends early.

    Raises:
        TypeError, ValueError: if ``r`` is of the wrong kind or negative.

    >>> FewerPerBlock((8, -1.0)).fewer(12)
    [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    """

    def __init__(self, r: int | list[int] | tuple[int, float] = 13) -> None:
        self.r = _check_r(r)

    def fewer(self, depth: int) -> list[int]:
        """Tokens to merge in each of ``depth`` blocks, before the limit of half of them."""
        if isinstance(self.r, int):
            return [self.r] * depth
        if isinstance(self.r, list):
            return (self.r + [0] * depth)[:depth]
        mean, inflection = self.r
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / max(1, depth - 1)
        return [int(first + step * index) for index in range(depth)]

    def reduces(self, index: int, depth: int) -> bool:
        """See :meth:`Schedule.reduces`."""
        return self.fewer(depth)[index] > 0

    def keep(self, index: int, count: int, info: ModelInfo, rate: float | None = None) -> int:
        """See :meth:`Schedule.keep`."""
        return count - min(self.fewer(info.depth)[index], count // 2)

    def search_space(self, depth: int, patches: int) -> SearchSpace[Schedule]:
        """The number of merges in all, over the blocks as evenly as whole numbers can be, the early
        blocks first.
        """
        most = depth * (patches // 2)

        def candidate(step: int) -> Schedule:
            each, more = divmod(most + 1 - step, depth)
            return FewerPerBlock(
                [each + (block < more) for block in range(depth)] if more else each
            )

        return SearchSpace(most + 1, candidate)


class CountPerBlock(Schedule):
    """A list says how many tokens leave each block, as a search or training may find it.

    Args:
        counts: patch tokens that each block leaves, from the first; they must not grow. A block
            that gets no more than that reduces nothing.

    Raises:
        TypeError, ValueError: if they are no positive integers, or grow.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = check_counts(counts, "counts")

    def reduces(self, index: int, depth: int) -> bool:
        """See :meth:`Schedule.reduces`."""
        return index == 0 or self.counts[index] < self.counts[index - 1]

    def keep(self, index: int, count: int, info: ModelInfo, rate: float | None = None) -> int:
        """See :meth:`Schedule.keep`."""
        return min(count, self.counts[index])

    def check(self, info: ModelInfo) -> None:
        """See :meth:`Schedule.check`.

        Raises:
            ValueError: if there is not one count per block.
        """
        _check_length(self.counts, "counts", info)


class SharePerBlock(Schedule):
    """A list says which share of the initial tokens leaves each block.

    Args:
        shares: of each block, from the first, in (0, 1]; they must not grow.
        power: that they are raised to; above 1 fewer tokens stay.

    Raises:
        TypeError, ValueError: if they are no such shares, or the power is not positive.
    """

    def __init__(self, shares: Sequence[float], power: float = 1.0) -> None:
        self.shares = tuple(check_keep_rate(share, "a share") for share in shares)
        self.power = check_number(power, "power", above=True)
        if any(later > share for share, later in itertools.pairwise(self.shares)):
            raise SettingError(f"shares must not grow, got {list(self.shares)}")

    def reduces(self, index: int, depth: int) -> bool:
        """See :meth:`Schedule.reduces`."""
        return self.shares[index] < (self.shares[index - 1] if index else 1)

    def keep(self, index: int, count: int, info: ModelInfo, rate: float | None = None) -> int:
        """See :meth:`Schedule.keep`."""
        wanted = round(self.shares[index] ** self.power * info.patches)
        return min(count, max(1, wanted)) if self.reduces(index, info.depth) else count

    def check(self, info: ModelInfo) -> None:
        """See :meth:`Schedule.check`.

        Raises:
            ValueError: if there is not one share per block.
        """
        _check_length(self.shares, "shares", info)

    def search_space(self, depth: int, patches: int, size: int = 1000) -> SearchSpace[Schedule]:
        """Powers from 12 down to ``12/size``."""
        return SearchSpace(
            size, lambda step: SharePerBlock(self.shares, 12 * (size + 1 - step) / size)
        )


def annealed(keep_rate: float, current: float | None) -> float:
    """The keep rate to use now: ``keep_rate``, or the current one while it is annealed.

    As in the official EViT, nothing is reduced unless both are below 1.
    """
    return keep_rate if current is None or keep_rate == 1 else current


def _check_length(numbers: Sequence[Any], name: str, info: ModelInfo) -> None:
    if len(numbers) != info.depth:
        raise SettingError(
            f"{name} must hold one number per block, {info.depth} here, got {len(numbers)}:"
            f" {list(numbers)}"
        )


def _check_r(r: Any) -> int | list[int] | tuple[int, float]:
    """One of the three forms, with plain numbers."""
    expected = "r must be an integer, a pair (r, inflection) or a list of integers, got"
    result: int | list[int] | tuple[int, float]
    if _is_integer(r):
        numbers, result = [r], int(r)
    elif not isinstance(r, Sequence) or isinstance(r, str) or not len(r):
        raise SettingTypeError(f"{expected} {r!r}")
    elif _is_pair(r):
        if not -1 <= float(r[1]) <= 1:
            raise SettingError(f"r's inflection must lie in [-1, 1], got {r[1]!r}")
        numbers, result = [r[0]], (int(r[0]), float(r[1]))
    elif all(_is_integer(number) for number in r):
        numbers, result = list(r), [int(number) for number in r]
    else:
        raise SettingTypeError(f"{expected} {r!r}")
    if min(numbers) < 0:
        raise SettingError(f"r counts tokens to merge and cannot be negative, got {r!r}")
    return result


def _is_pair(r: Sequence[Any]) -> bool:
    """Whether a sequence is ``(r, inflection)`` and not a list of two numbers."""
    if len(r) != 2 or not _is_integer(r[0]) or not isinstance(r[1], Real):
        return False
    return isinstance(r, tuple) or not _is_integer(r[1])


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
