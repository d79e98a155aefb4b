"""The interface that every token-reduction method implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from tdm_lightning.core.configurable import Configurable, arguments_line
from tdm_lightning.core.tokens import Observed, Output, Tokens

Criterion = Callable[[Tensor, Tensor], Tensor]


class Dial(NamedTuple):
    """The one setting by which a method costs more or less.

    Attributes:
        steps: how many settings there are.
        at: the method at setting 1…``steps``; none costs less than the one before it, and the
            last costs most.
    """

    steps: int
    at: Callable[[int], Strategy]


class Strategy(nn.Module, Configurable):
    """A set of hooks around a ViT block; the default reduces nothing.

    One pass runs ``begin``, then for every block ``before_block`` → attention →
    ``after_attention`` → MLP → ``after_block``, then ``finish``. Each hook takes the tokens and
    returns them, changed or not. A hook keeps nothing on ``self``: what must reach a later hook
    travels in ``tokens.carry``, so two passes never meet.

    Subclasses store every ``__init__`` argument under its own name (see :class:`Configurable`) and
    override what they need.

    Attributes:
        current_keep_rate: set by :class:`tdm_lightning.callbacks.KeepRateWarmup` while the keep
            rate is annealed; ``None`` (the default) means the strategy's own rate.
    """

    #: Whether the number of tokens depends on the image (then shapes are not static).
    adaptive: bool = False

    #: Whether :meth:`loss` compares with a frozen, unreduced copy of the model.
    needs_teacher: bool = False

    #: Whether the method leaves all tokens as they are, so that it can stand beside one that
    #: reduces them.
    keeps_tokens: bool = False

    #: Whether blocks compute chosen rows only (``Tokens.queries``); then the model's blocks must be
    #: able to.
    selects_rows: bool = False

    #: Whether tokens without a place on the grid run through the blocks, which RoPE and relative
    #: position biases rule out.
    absolute_positions_only: bool = False

    #: How the timm model must pool for the method's head, as ``timm.create_model`` takes it;
    #: ``None``: in any way.
    global_pool: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.current_keep_rate: float | None = None

    def bind(self, vit: Any, patches: int) -> None:
        """Check the settings against a timm model and build what depends on it. Called once by
        ``attach``.

        Args:
            vit: the timm model.
            patches: its number of patch tokens at the default image size.
        """

    def dial(self, depth: int, patches: int) -> Dial | None:
        """What to turn to meet a compute budget; the keep rate in thousandths, ``None`` for a
        method without one.

        Args:
            depth: number of the model's blocks.
            patches: number of its patch tokens.
        """
        return self.keep_rate_dial(1000) if "keep_rate" in self.config()["init_args"] else None

    def keep_rate_dial(self, steps: int) -> Dial:
        """The keep rates from ``1/steps`` to 1."""
        return Dial(steps, lambda step: self.changed(keep_rate=step / steps))

    def changed(self, **arguments: Any) -> Strategy:
        """A new, unattached strategy like this one but for some of its arguments."""
        config = self.config()
        return type(self).from_config({**config, "init_args": {**config["init_args"], **arguments}})

    def annealed(self, keep_rate: float) -> float:
        """The keep rate to use now: ``keep_rate``, or the current one while it is annealed.

        As in the official EViT, nothing is reduced unless both are below 1.
        """
        return (
            keep_rate
            if self.current_keep_rate is None or keep_rate == 1
            else self.current_keep_rate
        )

    def needs(self, index: int) -> frozenset[str]:
        """What ``after_attention`` of block ``index`` wants to see: of ``{"importance", "keys",
        "normed"}``.
        """
        return frozenset()

    def tracks_size(self) -> bool:
        """Whether the method itself needs to know how many patches each token stands for."""
        return False

    def begin(self, tokens: Tokens) -> Tokens:
        """Before the first block."""
        return tokens

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Before block ``index``."""
        return tokens

    def correct(self, index: int, tokens: Tokens, observed: Observed) -> Observed:
        """In a stack, before any member's :meth:`after_attention`: put right what members are about
        to see.
        """
        return observed

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """Between attention and MLP of block ``index``; after the whole block where both run in
        parallel.
        """
        return tokens

    def after_block(self, index: int, tokens: Tokens) -> Tokens:
        """After block ``index``."""
        return tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """After the last block, before the final norm."""
        return tokens

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The terms of the training loss by name; their sum is minimised.

        Args:
            output: the student's pass.
            target: labels, B, or soft targets, B×classes.
            criterion: the task loss.
            teacher: a frozen, unreduced model's pass, for methods that ask for one; otherwise what
                :meth:`baseline` gave.
        """
        return {"task": criterion(output.logits, target)}

    def baseline(self, model: Any, images: Tensor) -> Output | None:
        """A second pass that :meth:`loss` compares the training pass with, without gradient;
        ``None`` (the default): none.

        Args:
            model: the reduced model.
            images: the training step's, B×3×H×W.
        """
        return None

    def report(self, output: Output, target: Tensor) -> dict[str, Tensor]:
        """Numbers of a training step worth logging that are no terms of the loss, by name;
        arguments as :meth:`loss`.
        """
        return {}

    def param_groups(
        self, model: Any, lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """The optimizer groups that the method's recipe asks for; ``None`` (the default): the usual
        ones.

        Parameters in no group are not trained. Beside what torch optimizers read, a group may hold
        ``lr_scale``, a factor on the scheduled learning rate, and ``freeze_epochs``: for so many
        epochs its learning rate is 0.

        Args:
            model: the reduced model, so that names carry its prefixes.
            lr: base learning rate.
            weight_decay: for the parameters that decay.
        """
        return None

    def on_progress(self, epoch: int, step: int, total_steps: int) -> None:
        """Told before every training step where the run stands, for methods with a curriculum.

        Args:
            epoch: epochs done.
            step: optimizer steps done.
            total_steps: optimizer steps in the whole run.
        """

    def after_optimizer_step(self, model: Any, step: int, total_steps: int) -> None:
        """Told after every optimizer step, its gradients still there, for methods that act on the
        weights.

        Args:
            model: the reduced model.
            step: optimizer steps done, this one included.
            total_steps: optimizer steps in the whole run.
        """

    def reset_classifier(self, num_classes: int) -> None:
        """Told when the timm model gets another classifier, for methods with a classifier of their
        own.
        """

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return arguments_line(self.config())
