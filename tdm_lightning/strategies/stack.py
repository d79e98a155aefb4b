"""Several strategies around one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tdm_lightning.core.configurable import stored_name
from tdm_lightning.core.tokens import Observed, Output, Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.strategies.base import Criterion, Dial, Strategy


class Stack(Strategy):
    """Calls every hook of its members in order: ``attach(vit, [SViTE(), TDM()])`` makes one.

    At most one member may reduce tokens; the others leave them alone and act on the weights. A
    stack inside a stack counts as its members.

    Args:
        members: the strategies; none: the plain model.

    Raises:
        TypeError: if a member is no strategy.
        ValueError: if several reduce tokens, want another pooling or their own optimizer groups, or
            one is there twice.
    """

    def __init__(self, members: Sequence[Strategy] = ()) -> None:
        flat = _flat(members)
        nn.Module.__init__(self)  # the base class would set the members' rate before there are any
        self.members: Any = nn.ModuleList(flat)
        self.adaptive = any(member.adaptive for member in flat)
        self.needs_teacher = any(member.needs_teacher for member in flat)
        self.selects_rows = any(member.selects_rows for member in flat)
        self.absolute_positions_only = any(member.absolute_positions_only for member in flat)
        self.keeps_tokens = all(map(_keeps_tokens, flat))
        poolings = {member.global_pool for member in flat} - {None}
        if len(poolings) > 1:
            raise SettingError(
                "the members want the model to pool in different ways,"
                f" {sorted(map(str, poolings))}"
            )
        self.global_pool = next(iter(poolings), None)

    def config(self) -> dict[str, Any]:
        """See :class:`~tdm_lightning.core.configurable.Configurable`."""
        cls = type(self)
        members = [member.config() for member in self.members]
        return {
            "class_path": stored_name(cls),
            "init_args": {"members": members},
        }

    def dial(self, depth: int, patches: int) -> Dial | None:
        """That of the member that reduces tokens; where none does, of the first that has one."""
        dials = [(place, member.dial(depth, patches)) for place, member in enumerate(self.members)]
        found = [(place, dial) for place, dial in dials if dial is not None]
        if not found:
            return None
        place, dial = min(found, key=lambda item: self.members[item[0]].keeps_tokens)

        def at(step: int) -> Strategy:
            others = [member.changed() for member in self.members]
            return Stack([*others[:place], dial.at(step), *others[place + 1 :]])

        return Dial(dial.steps, at)

    @property
    def keep_rate(self) -> float:
        """That of the member that has one; no attribute without one."""
        for member in self.members:
            if hasattr(member, "keep_rate"):
                return member.keep_rate
        raise AttributeError(f"no member of this {type(self).__name__} has a keep rate")

    @property
    def current_keep_rate(self) -> float | None:
        """That of the members, while the keep rate is annealed."""
        return next(
            (
                member.current_keep_rate
                for member in self.members
                if member.current_keep_rate is not None
            ),
            None,
        )

    @current_keep_rate.setter
    def current_keep_rate(self, value: float | None) -> None:
        for member in self.members:
            member.current_keep_rate = value

    def bind(self, vit: Any, patches: int) -> None:
        """Bind every member."""
        for member in self.members:
            member.bind(vit, patches)

    def needs(self, index: int) -> frozenset[str]:
        """What any member wants to see."""
        return frozenset().union(*(member.needs(index) for member in self.members))

    def tracks_size(self) -> bool:
        """Whether any member does."""
        return any(member.tracks_size() for member in self.members)

    def begin(self, tokens: Tokens) -> Tokens:
        """See :class:`Strategy`, as for the hooks that follow."""
        for member in self.members:
            tokens = member.begin(tokens)
        return tokens

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """All members in order."""
        for member in self.members:
            tokens = member.before_block(index, tokens)
        return tokens

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """All members in order, once each has put right what they see."""
        for member in self.members:
            observed = member.correct(index, tokens, observed)
        for member in self.members:
            tokens = member.after_attention(index, tokens, observed)
        return tokens

    def after_block(self, index: int, tokens: Tokens) -> Tokens:
        """All members in order."""
        for member in self.members:
            tokens = member.after_block(index, tokens)
        return tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """All members in order."""
        for member in self.members:
            tokens = member.finish(tokens)
        return tokens

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The terms of the members that have a loss of their own; without any, the task loss."""
        own = [member for member in self.members if type(member).loss is not Strategy.loss]
        if not own:
            return super().loss(output, target, criterion, teacher)
        return {
            name: term
            for member in own
            for name, term in member.loss(output, target, criterion, teacher).items()
        }

    def baseline(self, model: Any, images: Tensor) -> Output | None:
        """That of the member that makes one."""
        return next(
            (
                found
                for member in self.members
                if (found := member.baseline(model, images)) is not None
            ),
            None,
        )

    def report(self, output: Output, target: Tensor) -> dict[str, Tensor]:
        """What all members report."""
        return {
            name: value
            for member in self.members
            for name, value in member.report(output, target).items()
        }

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Those of the member that asks for some.

        Raises:
            ValueError: if several do.
        """
        groups = [
            found
            for member in self.members
            if (found := member.param_groups(model, lr, weight_decay)) is not None
        ]
        if len(groups) > 1:
            raise SettingError(
                "several members of a stack ask for optimizer groups of their own; use one of them"
            )
        return groups[0] if groups else None

    def no_weight_decay(self) -> set[str]:
        """Names of the members' parameters that must not decay."""
        return {
            f"members.{index}.{name}"
            for index, member in enumerate(self.members)
            for name in getattr(member, "no_weight_decay", set)()
        }

    def on_progress(self, epoch: int, step: int, total_steps: int) -> None:
        """Tell every member."""
        for member in self.members:
            member.on_progress(epoch, step, total_steps)

    def after_optimizer_step(self, model: Any, step: int, total_steps: int) -> None:
        """Tell every member."""
        for member in self.members:
            member.after_optimizer_step(model, step, total_steps)

    def reset_classifier(self, num_classes: int) -> None:
        """Tell every member."""
        for member in self.members:
            member.reset_classifier(num_classes)


def stacked(strategy: Any) -> Strategy:
    """A strategy as it is, several as a :class:`Stack`.

    Raises:
        TypeError: if it is neither a strategy nor a list of some.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, (list, tuple)):
        raise SettingTypeError(
            "strategy must be a Strategy such as TDM(keep_rate=0.7), or a list of some, got"
            f" {strategy!r}"
        )
    return Stack(strategy)


def _flat(members: Any) -> list[Strategy]:
    if isinstance(members, str) or not isinstance(members, Sequence):
        raise SettingTypeError(
            f"members must be a list of strategies such as [SViTE(), TDM()], got {members!r}"
        )
    flat: list[Strategy] = []
    for member in members:
        if not isinstance(member, Strategy):
            raise SettingTypeError(
                f"each member must be a Strategy such as TDM(keep_rate=0.7), got {member!r}"
            )
        flat += member.members if isinstance(member, Stack) else [member]
    reducing = [type(member).__name__ for member in flat if not _keeps_tokens(member)]
    if len(reducing) > 1:
        raise SettingError(
            f"at most one strategy can reduce the tokens, got {', '.join(reducing)}; keep one of"
            " them"
        )
    if len({id(member) for member in flat}) < len(flat):
        raise SettingError("the same strategy is there twice; make another one")
    return flat


def _keeps_tokens(member: Strategy) -> bool:
    return member.keeps_tokens or type(member) is Strategy
