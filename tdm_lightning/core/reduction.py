"""What a merger sees of N tokens, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from tdm_lightning.ops import group_totals


class Role(IntEnum):
    """What a reducing layer did with a patch."""

    KEPT = 0  #: passed on as it is
    MATCHED = 1  #: fused with similar attentive tokens
    CLUSTERED = 2  #: combined with other inattentive tokens
    DROPPED = 3  #: gone
    PARKED = 4  #: waits outside the blocks and comes back


@dataclass(frozen=True)
class Seen:
    """The N patch tokens at a reduction, and what a block's attention tells of them.

    Attributes:
        x: the tokens, B×N×C; between attention and MLP of a block: with the attention's residual.
        size: patches that each token stands for, B×N; always there for mergers, elsewhere ``None``
            where nothing follows sizes.
        importance: non-negative score of each token, B×N, float32; ``None`` where nothing asked.
            From a block: the attention that the token gets from the class token (or tokens), mean
            over heads, not renormalized after the prefix is cut off; in models without a class
            token, the mean attention that it receives from all patches.
        keys: head-averaged keys of the attention, without positions, B×N×d; only where asked for.
        normed: ``x`` under the block's second norm, B×N×C; only where asked for.
        prefix: number of tokens in front of the patches.
    """

    x: Tensor
    size: Tensor | None = None
    importance: Tensor | None = None
    keys: Tensor | None = None
    normed: Tensor | None = None
    prefix: int = 0


@dataclass(frozen=True)
class Reduction:
    """The outcome of one reducing layer for N patch tokens.

    Attributes:
        x: the M tokens that leave, B×M×C.
        assignment: the leaving token that now holds each entering one, B×N, int64; -1 where it was
            dropped.
        role: :class:`Role` of each entering token, B×N, int64.
        size: patches that each leaving token stands for, B×M; ``None``: the sum over its members.
        position: the entering token in whose position each leaving one stands, B×M, int64;
            ``None``: see :meth:`tdm_lightning.core.tokens.Tokens.reduced`.
    """

    x: Tensor
    assignment: Tensor
    role: Tensor
    size: Tensor | None = None
    position: Tensor | None = None

    @classmethod
    def lazily(
        cls,
        x: Tensor,
        fate: Callable[[], tuple[Tensor, Tensor]],
        size: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Reduction:
        """A reduction whose ``assignment`` and ``role``, as ``fate()`` gives them, are worked out
        when something asks: a trace, positions, sizes that are not given.
        """
        if torch.compiler.is_compiling():  # a compiler leaves out by itself what nobody asks for
            return cls(x, *fate(), size, position)
        made = object.__new__(cls)
        made.__dict__.update(x=x, size=size, position=position, _fate=fate)
        return made

    def __getattr__(self, name: str) -> Tensor:
        # only for what is not there yet
        if name not in ("assignment", "role") or "_fate" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        assignment, role = self.__dict__.pop("_fate")()
        self.__dict__.update(assignment=assignment, role=role)
        return self.__dict__[name]

    @property
    def settled(self) -> bool:
        """Whether ``assignment`` and ``role`` are there already."""
        return "_fate" not in self.__dict__

    def totals(self, values: Tensor) -> Tensor:
        """Sum over the members of each leaving token, B×M, of a value of each entering one, B×N."""
        count = self.x.shape[1]
        # What is dropped goes to one slot more.
        slot = torch.where(self.assignment < 0, count, self.assignment)
        return group_totals(values, slot, count + 1)[:, :count]
