"""Argument checks that several strategies share: what was wrong, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from tdm_lightning.errors import SettingError, SettingTypeError

Choice = TypeVar("Choice", bound=str)


def check_keep_rate(value: Any, name: str = "keep_rate") -> float:
    """A share of the tokens in (0, 1].

    Raises:
        TypeError: if it is not a number.
        ValueError: if it lies outside (0, 1] or is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingTypeError(
            f"{name} must be a number in (0, 1], got {value!r} of type {type(value).__name__}"
        )
    if math.isnan(value) or not 0 < float(value) <= 1:
        raise SettingError(f"{name} must lie in (0, 1], got {value!r}")
    return float(value)


def check_layers(layers: Any) -> tuple[int, ...]:
    """Block indices counted from 0, each at most once, in ascending order.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if an index is negative or repeated.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise SettingTypeError(
            f"layers must be a sequence of block indices such as (3, 6, 9), got {layers!r}"
        )
    if any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in layers):
        raise SettingTypeError(f"layers must hold integers, got {list(layers)!r}")
    if any(layer < 0 for layer in layers):
        raise SettingError(f"layers count from 0 and cannot be negative, got {list(layers)!r}")
    if len(set(layers)) != len(layers):
        raise SettingError(f"layers must not repeat a block, got {list(layers)!r}")
    return tuple(sorted(int(layer) for layer in layers))


def check_layers_exist(layers: Sequence[int], depth: int) -> None:
    """Refuse layers that a model of ``depth`` blocks does not have.

    Raises:
        ValueError: if an index is ``depth`` or more.
    """
    beyond = [layer for layer in layers if layer >= depth]
    if beyond:
        raise SettingError(
            f"layers {beyond} do not exist: the model has {depth} blocks, so layers must lie in"
            f" 0…{depth - 1}"
        )


def check_choice(value: Choice, choices: Sequence[str], name: str) -> Choice:
    """One of a few words.

    Raises:
        ValueError: if it is none of them.
    """
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_fraction(value: Any, name: str) -> float:
    """A number in (0, 1]; the same errors as :func:`check_keep_rate`."""
    return check_keep_rate(value, name)


def check_count(value: Any, name: str, least: int = 1) -> int:
    """An integer of at least ``least``.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SettingTypeError(
            f"{name} must be an integer, got {value!r} of type {type(value).__name__}"
        )
    if value < least:
        raise SettingError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_number(value: Any, name: str, least: float = 0.0, above: bool = False) -> float:
    """A finite number of at least ``least``, or ``above`` it.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is smaller, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingTypeError(
            f"{name} must be a number, got {value!r} of type {type(value).__name__}"
        )
    if not math.isfinite(value) or value < least or (above and value == least):
        limit = "" if least == -math.inf else f" and {'above' if above else 'at least'} {least:g}"
        raise SettingError(f"{name} must be finite{limit}, got {value!r}")
    return float(value)


def check_counts(counts: Any, name: str, least: int = 1) -> tuple[int, ...]:
    """Numbers of tokens, one per block, none greater than the one before it.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if one is smaller than ``least`` or they grow.
    """
    if isinstance(counts, str) or not isinstance(counts, Sequence) or not counts:
        raise SettingTypeError(
            f"{name} must hold the patches of each block, such as [196, 140, …], got {counts!r}"
        )
    if any(isinstance(count, bool) or not isinstance(count, Integral) for count in counts):
        raise SettingTypeError(f"{name} must hold integers, got {list(counts)!r}")
    if min(counts) < least:
        least_is = "be negative" if least == 0 else f"be smaller than {least}"
        raise SettingError(f"{name} cannot {least_is}, got {list(counts)!r}")
    grown = [block for block in range(1, len(counts)) if counts[block] > counts[block - 1]]
    if grown:
        block = grown[0]
        raise SettingError(
            f"{name} must not grow, because a block only has patches that the block before kept;"
            f" block {block} has {counts[block]} after {counts[block - 1]}"
        )
    return tuple(int(count) for count in counts)
