"""The interface that every merger implements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Set

import torch

from tdm_lightning.core.configurable import Configurable
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.errors import ReductionError, SettingError, SettingTypeError

#: What a merger can ask to see beside the tokens and their sizes.
WORDS = frozenset({"importance", "keys", "normed"})


class Merger(Configurable, ABC):
    """What N tokens become when fewer may stay. Has no parameters and no state.

    Subclasses store every ``__init__`` argument under its own name (see
    :class:`~tdm_lightning.core.configurable.Configurable`), so they can be named in YAML and on the
    command line: ``merger: my_package.Halve``.

    Attributes:
        proportional_attention: add ``log(size)`` of each token to the logits of its key in later
            blocks, so that it attracts as much attention as the patches that it stands for (Bolya
            et al., 2023, eq. 1).
        reads_sizes: whether ``Seen.size`` matters to it; a merger that says no saves following the
            sizes.

    >>> class Halve(Merger):
    ...     def __call__(self, seen, keep):
    ...         here = torch.arange(seen.x.shape[1]).expand(seen.x.shape[:2])
    ...         group = here * keep // seen.x.shape[1]  # neighbours in the sequence
    ...         total = torch.zeros(len(group), keep).scatter_add(1, group, seen.size)
    ...         share = (seen.size / total.gather(1, group)).unsqueeze(-1)
    ...         index = group.unsqueeze(-1).expand_as(seen.x)
    ...         x = torch.zeros(len(group), keep, seen.x.shape[2]).scatter_add(
    ...             1, index, share * seen.x
    ...         )
    ...         return Reduction(x, group, torch.full_like(group, int(Role.MATCHED)), total)
    >>> from tdm_lightning.core.reduction import Role
    >>> Halve()(Seen(torch.ones(1, 4, 2), torch.ones(1, 4)), 2).size
    tensor([[2., 2.]])
    """

    proportional_attention: bool = False
    reads_sizes: bool = True

    def requires(self) -> frozenset[str]:
        """What it must see beside tokens and sizes: of ``{"importance", "keys", "normed"}``."""
        return frozenset()

    def prefers(self) -> frozenset[str]:
        """What it uses of :data:`WORDS` where that can be seen, and does without elsewhere."""
        return frozenset()

    def check(self, patches: int, keep: int) -> None:
        """Refuse, before training starts, what cannot be done: ``patches`` tokens to ``keep``.

        Raises:
            ValueError: if it cannot; the default takes anything.
        """

    def leaving(self, keep: int) -> int:
        """How many tokens leave where ``keep`` are asked for: as many, unless it adds some."""
        return keep

    @abstractmethod
    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """Make ``keep`` tokens of N, ``1 ≤ keep < N``."""

    def represent(self, seen: Seen) -> Reduction:
        """Tokens that stand for all N, which stay (Evo-ViT's waiting ones); here a quarter."""
        return self(seen, max(1, math.ceil(seen.x.shape[1] / 4)))


def check_merger(merger: object, sees: Set[str] = WORDS) -> Merger | None:
    """A merger, or ``None``.

    Args:
        merger: what was given.
        sees: what there is to see where it merges, beside tokens and sizes.

    Raises:
        TypeError: if it is something else.
        ValueError: if it must see more than there is.
    """
    if merger is None:
        return None
    if not isinstance(merger, Merger):
        raise SettingTypeError(
            "merger must be a Merger such as TokenMerger(), or None, got"
            f" {merger!r} of type {type(merger).__name__}"
        )
    if unknown := merger.requires() - WORDS:
        raise SettingError(
            f"{type(merger).__name__}.requires() asks for {_listed(unknown)}; a merger can see"
            f" {_listed(WORDS)}"
        )
    if missing := merger.requires() - sees:
        raise SettingError(
            f"this strategy merges before a block, so {merger!r} has nothing to compare: it asks"
            f" for {_listed(missing)} of an attention that has not been computed. Take a merger"
            " that goes by the tokens, such as TokenMerger(features='tokens')"
        )
    return merger


def check_reduction(found: Reduction, seen: Seen, keep: int, merger: Merger, block: int) -> None:
    """Whether a merger gave what it should; names block, expected and found where not.

    Shapes are checked always, but of what is not worked out yet. Values are looked at where the
    merger is a user's own, as that waits for the device, and not while the model is compiled or
    exported.

    Raises:
        ValueError: if not.
    """
    batch, n, width = seen.x.shape
    leaving = merger.leaving(keep)
    name = f"{type(merger).__name__} in block {block}"
    if not isinstance(found, Reduction):
        raise ReductionError(f"{name} gave a {type(found).__name__}, expected a Reduction")
    own = type(merger).__module__.partition(".")[0] == "tdm_lightning"
    fate = ("assignment", "role") if found.settled or not own else ()
    expected = {
        "x": (batch, leaving, width),
        **dict.fromkeys(fate, (batch, n)),
        "size": (batch, leaving),
    }
    for part, shape in expected.items():
        value = getattr(found, part)
        if value is None and part == "size":
            continue
        if tuple(value.shape) != shape:
            raise ReductionError(
                f"{name} was to make {leaving} of {n} tokens: expected {part} of shape {shape},"
                f" found {tuple(value.shape)}"
            )
    for part in fate:
        if getattr(found, part).dtype != torch.int64:
            raise ReductionError(
                f"{name}: expected {part} of type int64, found {getattr(found, part).dtype}"
            )
    if not own and not torch.compiler.is_compiling() and not seen.x.is_meta:
        _check_values(found, seen, leaving, name)


def _check_values(found: Reduction, seen: Seen, leaving: int, name: str) -> None:
    if not -1 <= int(found.assignment.min()) <= int(found.assignment.max()) < leaving:
        raise ReductionError(
            f"{name}: expected assignment from -1 (dropped) to {leaving - 1}, found"
            f" {int(found.assignment.min())} to {int(found.assignment.max())}"
        )
    finite = seen.x.isfinite().all()
    for part in ("x", "size"):
        value = getattr(found, part)
        if value is not None and finite and not value.isfinite().all():
            raise ReductionError(
                f"{name}: expected finite numbers of finite tokens, found"
                f" {int((~value.isfinite()).sum())} in {part} that are not; a weight may have been"
                " divided by zero"
            )


def _listed(words: Set[str]) -> str:
    return ", ".join(map(repr, sorted(words)))
