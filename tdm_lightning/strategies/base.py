"""The interface that every token-reduction method implements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from tdm_lightning.core.configurable import Configurable, arguments_line
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.schedules import RateAtBlocks, SearchSpace
from tdm_lightning.schedules import annealed as annealed_rate
from tdm_lightning.strategies.objective import TrainingObjective


@dataclass(frozen=True)
class Requirements:
    """What a strategy asks of the model and of the run around it.

    Attributes:
        pooling: what the model's head must read: ``"patches"``, their average, or the class
            ``"token"``; ``None``: either.
        absolute_positions: tokens without a position on the grid run through the blocks, which RoPE
            and relative position biases rule out.
        rows: blocks compute some rows only, so the model's blocks must be able to.
        ahead: tokens are merged by a block's attention before its values are read, so the model's
            blocks must be able to.
        sizes: the number of patches that each token stands for is followed.
        teacher: the loss compares with a frozen, unreduced copy of the model.
    """

    pooling: Literal["patches", "token"] | None = None
    absolute_positions: bool = False
    rows: bool = False
    ahead: bool = False
    sizes: bool = False
    teacher: bool = False


@dataclass(frozen=True)
class Ahead:
    """What was merged ahead of a block.

    Attributes:
        tokens: those that are left.
        group: the patch token that now holds each one, B×N, int64.
        weight: its share in that token, B×N; those of a group sum to one.
    """

    tokens: Tokens
    group: Tensor
    weight: Tensor


class Strategy(nn.Module, Configurable):
    """A set of hooks around a ViT block; the default reduces nothing.

    One pass runs ``begin``, then for every block ``before_block`` → attention → ``after_attention``
    → MLP → ``after_block``, then ``finish``. Each hook takes the tokens and returns them, changed
    or not. A hook keeps nothing on ``self``: what must reach a later hook travels in
    ``tokens.state``, a dataclass of the strategy's own, so two passes never meet.

    Subclasses store every ``__init__`` argument under its own name (see
    :class:`~tdm_lightning.core.configurable.Configurable`) and override what they need. A method
    that also changes training derives from
    :class:`~tdm_lightning.strategies.objective.TrainingObjective` too.

    Attributes:
        adaptive: whether the number of tokens depends on the image (then shapes are not static).
        keeps_tokens: whether the method leaves all tokens as they are, so that it can stand beside
            one that reduces them.
        current_keep_rate: set by :class:`tdm_lightning.callbacks.KeepRateWarmup` while the keep
            rate is annealed; ``None`` (the default) means the strategy's own rate.
    """

    adaptive: bool = False
    keeps_tokens: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.current_keep_rate: float | None = None

    # What it is

    def requires(self) -> Requirements:
        """What it asks of the model and of the run around it; by default nothing."""
        return Requirements()

    @property
    def objective(self) -> TrainingObjective | None:
        """Its own part in training; ``None``: it has none."""
        return self if isinstance(self, TrainingObjective) else None

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check the settings against a model and build what depends on it. Called once by
        ``attach``.

        Args:
            vit: the model itself.
            info: the model in numbers.
        """

    def reset_classifier(self, num_classes: int) -> None:
        """Told when the model gets another classifier, for methods with a classifier of their
        own.
        """

    # What it does in a pass

    def needs(self, index: int, info: ModelInfo) -> frozenset[str]:
        """What ``after_attention`` of block ``index`` wants to see: of ``{"importance",
        "received", "keys", "normed"}``. The first two exclude each other.
        """
        return frozenset()

    def begin(self, tokens: Tokens) -> Tokens:
        """Before the first block."""
        return tokens

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Before block ``index``."""
        return tokens

    def rows(self, index: int, tokens: Tokens) -> int | None:
        """How many rows of ``tokens.x`` block ``index`` computes, the first ones, prefix included;
        its attention still looks at all of them, and only these leave it. ``None``: all.

        Asked after :meth:`before_block`, of strategies whose requirements say ``rows``.
        """
        return None

    def ahead(self, index: int, tokens: Tokens) -> Callable[[Tensor], Ahead] | None:
        """How block ``index`` merges by its own attention, before its values are read; ``None``:
        it does not.

        Asked after :meth:`before_block`, of strategies whose requirements say ``ahead``; the blocks
        that do so show nothing to :meth:`after_attention`.

        Returns:
            A function of the mean attention that each row of ``tokens.x`` receives over all heads
            and rows, B×T, float32.
        """
        return None

    def correct(self, index: int, tokens: Tokens, seen: Seen) -> Seen:
        """In a stack, before any member's :meth:`after_attention`: put right what members are about
        to see.
        """
        return seen

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Between attention and MLP of block ``index``; after the full block where both run in
        parallel.
        """
        return tokens

    def after_block(self, index: int, tokens: Tokens) -> Tokens:
        """After block ``index``."""
        return tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """After the last block, before the final norm."""
        return tokens

    def spares_class_tokens(self) -> bool:
        """Whether ``after_attention``, ``after_block`` and ``finish`` change patch tokens alone.

        Then, behind the last block's attention, class tokens know nothing of them any more, and
        where a head reads only those, the three are left out and no other row is computed. By
        default: whether they are overridden. A class that overrides one of them without touching
        class tokens says so by ``return self.keeps_hooks_of(ThatClass)``.
        """
        return self.keeps_hooks_of(Strategy)

    def keeps_hooks_of(self, cls: type[Strategy]) -> bool:
        """Whether these three hooks are those of ``cls``, and no subclass has others."""
        names = ("after_attention", "after_block", "finish")
        return all(getattr(type(self), name) is getattr(cls, name) for name in names)

    def all_patches(self, tokens: Tokens) -> Tensor:
        """The patch tokens there are, B×(N+P)×C: those in the blocks, then P that wait outside."""
        return tokens.patches

    # What it costs

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """The settings among which one meets a compute budget; ``None`` for a method without one.

        By default the keep rate in thousandths.

        Args:
            depth: number of the model's blocks.
            patches: number of its patch tokens.
        """
        if "keep_rate" not in self.config()["init_args"]:
            return None
        rates = RateAtBlocks().search_space(depth, patches)
        return rates.map(
            lambda schedule: self.changed(keep_rate=cast(RateAtBlocks, schedule).keep_rate)
        )

    def changed(self, **arguments: Any) -> Strategy:
        """A new, unattached strategy like this one but for some of its arguments."""
        config = self.config()
        return type(self).from_config({**config, "init_args": {**config["init_args"], **arguments}})

    def annealed(self, keep_rate: float) -> float:
        """The keep rate to use now: ``keep_rate``, or the current one while it is annealed.

        As in the official EViT, nothing is reduced unless both are below 1.
        """
        return annealed_rate(keep_rate, self.current_keep_rate)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return arguments_line(self.config())
