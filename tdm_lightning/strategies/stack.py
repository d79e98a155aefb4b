"""Several strategies around one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tdm_lightning.core.configurable import stored_name
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.output import Output
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.schedules import SearchSpace
from tdm_lightning.strategies.base import Ahead, Requirements, Strategy
from tdm_lightning.strategies.objective import Criterion, TrainingObjective


class Stack(Strategy):
    """Calls every hook of its members in order: ``attach(vit, [SViTE(), TDM()])`` makes one.

    At most one member may reduce tokens; the others leave them alone and act on the weights. A
    stack inside a stack counts as its members.

    Args:
        members: the strategies; none: the plain model.

    Raises:
        TypeError: if a member is no strategy.
        ValueError: if several reduce tokens or want another pooling, or one is there twice.
    """

    def __init__(self, members: Sequence[Strategy] = ()) -> None:
        flat = _flat(members)
        nn.Module.__init__(self)  # the base class would set the members' rate before there are any
        self.members: Any = nn.ModuleList(flat)
        self.adaptive = any(member.adaptive for member in flat)
        self.keeps_tokens = all(map(_keeps_tokens, flat))
        poolings = {member.requires().pooling for member in flat} - {None}
        if len(poolings) > 1:
            raise SettingError(
                "the members want the model to pool in different ways,"
                f" {sorted(map(str, poolings))}"
            )

    def config(self) -> dict[str, Any]:
        """See :class:`~tdm_lightning.core.configurable.Configurable`."""
        members = [member.config() for member in self.members]
        return {"class_path": stored_name(type(self)), "init_args": {"members": members}}

    def requires(self) -> Requirements:
        """What any member asks for."""
        asked = [member.requires() for member in self.members]
        return Requirements(
            pooling=next((one.pooling for one in asked if one.pooling is not None), None),
            absolute_positions=any(one.absolute_positions for one in asked),
            rows=any(one.rows for one in asked),
            ahead=any(one.ahead for one in asked),
            sizes=any(one.sizes for one in asked),
            teacher=any(one.teacher for one in asked),
        )

    @property
    def objective(self) -> TrainingObjective | None:
        """The members' objectives together; ``None`` where no member has one."""
        return JointObjective(self.members) if any(m.objective for m in self.members) else None

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """That of the member that reduces tokens; where none does, of the first that has one."""
        spaces = [member.search_space(depth, patches) for member in self.members]
        found = [index for index, space in enumerate(spaces) if space is not None]
        if not found:
            return None
        chosen = min(found, key=lambda index: self.members[index].keeps_tokens)

        def with_candidate(candidate: Strategy) -> Strategy:
            members = [member.changed() for member in self.members]
            members[chosen] = candidate
            return Stack(members)

        return spaces[chosen].map(with_candidate)

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
        rates = (member.current_keep_rate for member in self.members)
        return next((rate for rate in rates if rate is not None), None)

    @current_keep_rate.setter
    def current_keep_rate(self, value: float | None) -> None:
        for member in self.members:
            member.current_keep_rate = value

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Bind every member."""
        for member in self.members:
            member.bind(vit, info)

    def needs(self, index: int, info: ModelInfo) -> frozenset[str]:
        """What any member wants to see."""
        return frozenset().union(*(member.needs(index, info) for member in self.members))

    # In a pass each member finds its own state; theirs together are the stack's.

    def _in_turn(self, tokens: Tokens, hook: Callable[[Strategy, Tokens], Tokens]) -> Tokens:
        """The tokens after all members in order had them."""
        states = list(tokens.state or [None] * len(self.members))
        for index, member in enumerate(self.members):
            tokens = hook(member, tokens.replace(state=states[index]))
            states[index] = tokens.state
        return tokens.replace(state=tuple(states))

    def begin(self, tokens: Tokens) -> Tokens:
        """See :class:`Strategy`, as for the hooks that follow."""
        return self._in_turn(tokens, lambda member, now: member.begin(now))

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """All members in order."""
        return self._in_turn(tokens, lambda member, now: member.before_block(index, now))

    def rows(self, index: int, tokens: Tokens) -> int | None:
        """Those of the member that chooses some."""
        rows = (member.rows(index, tokens) for member in self.members)
        return next((found for found in rows if found is not None), None)

    def ahead(self, index: int, tokens: Tokens) -> Callable[[Tensor], Ahead] | None:
        """That of the member that merges so; the others' states stay as they are."""
        found = (member.ahead(index, tokens) for member in self.members)
        return next((one for one in found if one is not None), None)

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """All members in order, once each has put right what they see."""
        for member in self.members:
            seen = member.correct(index, tokens, seen)
        return self._in_turn(tokens, lambda member, now: member.after_attention(index, now, seen))

    def spares_class_tokens(self) -> bool:
        """Whether all members do."""
        spared = all(member.spares_class_tokens() for member in self.members)
        return spared and self.keeps_hooks_of(Stack)

    def after_block(self, index: int, tokens: Tokens) -> Tokens:
        """All members in order."""
        return self._in_turn(tokens, lambda member, now: member.after_block(index, now))

    def finish(self, tokens: Tokens) -> Tokens:
        """All members in order."""
        return self._in_turn(tokens, lambda member, now: member.finish(now))

    def all_patches(self, tokens: Tokens) -> Tensor:
        """Those that the member which reduces tokens knows of."""
        for index, member in enumerate(self.members):
            if not _keeps_tokens(member):
                state = None if tokens.state is None else tokens.state[index]
                return member.all_patches(tokens.replace(state=state))
        return tokens.patches

    def no_weight_decay(self) -> set[str]:
        """Names of the members' parameters that must not decay."""
        return {
            f"members.{index}.{name}"
            for index, member in enumerate(self.members)
            for name in getattr(member, "no_weight_decay", set)()
        }

    def reset_classifier(self, num_classes: int) -> None:
        """Tell every member."""
        for member in self.members:
            member.reset_classifier(num_classes)


class JointObjective(TrainingObjective):
    """The training objectives of a stack's members, each with its own state of a pass.

    Args:
        members: of the stack.
    """

    def __init__(self, members: Sequence[Strategy]) -> None:
        self._members = members

    @property
    def _objectives(self) -> list[tuple[int, TrainingObjective]]:
        """Those there are, each with its member's number."""
        found = ((index, member.objective) for index, member in enumerate(self._members))
        return [(index, objective) for index, objective in found if objective is not None]

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The terms of the members that have a loss of their own; without any, the task loss."""
        terms: dict[str, Tensor] = {}
        for index, objective in self._objectives:
            if type(objective).loss is not TrainingObjective.loss:
                own, compared = _of_member(output, index), teacher and _of_member(teacher, index)
                terms |= objective.loss(own, target, criterion, compared)
        return terms or super().loss(output, target, criterion, teacher)

    def reads_logits_alone(self) -> bool:
        """Whether all members do."""
        return all(objective.reads_logits_alone() for _, objective in self._objectives)

    def second_pass(self, model: Any, images: Tensor) -> Output | None:
        """That of the member that makes one."""
        passes = (one.second_pass(model, images) for _, one in self._objectives)
        return next((found for found in passes if found is not None), None)

    def report(self, output: Output, target: Tensor) -> dict[str, Tensor]:
        """What all members report."""
        found: dict[str, Tensor] = {}
        for index, objective in self._objectives:
            found |= objective.report(_of_member(output, index), target)
        return found

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Those of the member that asks for some.

        Raises:
            ValueError: if several do.
        """
        asked = [one.param_groups(model, lr, weight_decay) for _, one in self._objectives]
        groups = [found for found in asked if found is not None]
        if len(groups) > 1:
            raise SettingError(
                "several members of a stack ask for optimizer groups of their own; use one of them"
            )
        return groups[0] if groups else None

    def on_progress(self, epoch: int, step: int, total_steps: int) -> None:
        """Tell every member."""
        for _, objective in self._objectives:
            objective.on_progress(epoch, step, total_steps)

    def after_optimizer_step(self, model: Any, step: int, total_steps: int) -> None:
        """Tell every member."""
        for _, objective in self._objectives:
            objective.after_optimizer_step(model, step, total_steps)


def _of_member(output: Output, index: int) -> Output:
    """A pass as one member knows it: with its own state, where the pass is of the stack."""
    state = output.state[index] if isinstance(output.state, tuple) else None
    return replace(output, state=state)


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
