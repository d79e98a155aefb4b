"""Distillation: learn from the unreduced model while fine-tuning, beside any method."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.checks import check_number
from tdm_lightning.core.output import Output
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies.base import Requirements, Strategy
from tdm_lightning.strategies.objective import Criterion, TrainingObjective


class Distillation(Strategy, TrainingObjective):
    """Adds the distance to the unreduced model's answers to the training loss (Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015).

    The teacher is a frozen copy of the model with its starting weights. It reduces nothing itself
    and stands beside a method: ``tdm.attach(vit, [tdm.Distillation(), tdm.WardTDM()])``.

    Args:
        weight: of the Kullback-Leibler divergence from the teacher's probabilities, beside the task
            loss with weight 1.
        temperature: both models' logits are divided by it; the divergence is multiplied by its
            square, which keeps the gradients as large.

    Raises:
        TypeError, ValueError: if an argument is no positive number.
    """

    keeps_tokens = True

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.weight = check_number(weight, "weight", above=True)
        self.temperature = check_number(temperature, "temperature", above=True)

    def requires(self) -> Requirements:
        """A teacher."""
        return Requirements(teacher=True)

    def reads_logits_alone(self) -> bool:
        """It does."""
        return True

    def loss(
        self, output: Output, target: Tensor, criterion: Criterion, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The task loss, and the divergence from the teacher's answers.

        Raises:
            ValueError: without a teacher, or if it has other classes.
        """
        if teacher is None:
            raise SettingError("Distillation compares with a teacher's pass, and there is none")
        if teacher.logits.shape != output.logits.shape:
            raise SettingError(
                f"the teacher answers in shape {tuple(teacher.logits.shape)}, the model in"
                f" {tuple(output.logits.shape)}; both need the same classes"
            )
        found, wanted = (
            (logits.float() / self.temperature).log_softmax(dim=-1)
            for logits in (output.logits, teacher.logits)
        )
        distance = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        terms = super().loss(output, target, criterion, teacher)
        return terms | {"distillation": self.weight * self.temperature**2 * distance}
