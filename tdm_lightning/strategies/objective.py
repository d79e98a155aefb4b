"""What a method does to training, where it does anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdm_lightning.core.output import Output

Criterion = Callable[[Tensor, Tensor], Tensor]


class TrainingObjective:
    """A method's own part in training: losses, a second pass, optimizer groups, a curriculum.

    A :class:`~tdm_lightning.Strategy` that also derives from this has one; one that does not is
    trained with the task loss alone. Every method here has a default that does nothing special.
    """

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The terms of the training loss by name; their sum is minimized.

        Args:
            output: the student's pass.
            target: labels, B, or soft targets, B×classes.
            criterion: the task loss.
            teacher: a frozen, unreduced model's pass, for methods that require one; otherwise what
                :meth:`second_pass` gave.
        """
        return {"task": criterion(output.logits, target)}

    def reads_logits_alone(self) -> bool:
        """Whether :meth:`loss` and :meth:`report` read nothing of a pass but its logits; then the
        last block computes class tokens only. By default: whether neither is overridden.
        """
        names, cls = ("loss", "report"), type(self)
        return all(getattr(cls, name) is getattr(TrainingObjective, name) for name in names)

    def second_pass(self, model: Any, images: Tensor) -> Output | None:
        """A pass that :meth:`loss` compares the training pass with, without gradient; ``None`` (the
        default): none.

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
