"""What a reduced model learns from the unreduced one: its logits, and its features of the patches
that are left.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.output import Output
from tdm_lightning.errors import SettingError
from tdm_lightning.ops import group_totals, merge_groups


def distillation(
    output: Output,
    teacher: Output | None,
    initial: int,
    kept: Tensor | None,
    holder: Tensor | None,
    name: str,
    token_loss: Literal["mse", "kl"] = "mse",
) -> tuple[Tensor, Tensor]:
    """How far a training pass is from the teacher's, in logits and in patch tokens (Rao et al.,
    DynamicViT, 2021, §3.3).

    Args:
        output: the student's pass.
        teacher: the same timm model's pass on the same images, unreduced.
        initial: N0, number of patches.
        kept: which of the patches are still there, B×N0, without gradient; ``None``: all. Not
            asked where tokens were merged.
        holder: where tokens were merged, the one that holds each patch, -1 where it was dropped,
            B×N0; otherwise ``None``.
        name: of the strategy, for error messages.
        token_loss: squared distance of two tokens, or divergence of their features as if these were
            logits.

    Returns:
        Mean divergence of the logits, and mean distance of the tokens, 0 where none is kept. A
        combined token is compared with the mean of the teacher's tokens that it stands for; tokens
        appended behind the patches, such as packages, with nothing.

    Raises:
        ValueError: if the teacher is missing or of another shape.
    """
    teacher = _checked(output, teacher, initial, name)
    prefix = teacher.features.shape[1] - initial
    student, wanted = output.features[:, prefix:].float(), teacher.features[:, prefix:].float()
    if holder is None:
        student = student[:, :initial]
        kept = student.new_ones(student.shape[:2]) if kept is None else kept
    else:
        groups = student.shape[1]
        slot = torch.where(holder < 0, groups, holder)  # what was dropped goes to one slot more
        ones = torch.ones_like(slot, dtype=torch.float32)
        members = group_totals(ones, slot, groups + 1)
        wanted = merge_groups(wanted, slot, 1 / members.gather(1, slot), groups + 1)[:, :groups]
        kept = torch.ones_like(members[:, :groups])
    distance = (
        (student - wanted).square().mean(-1) if token_loss == "mse" else divergence(student, wanted)
    )
    logits = divergence(output.logits.float(), teacher.logits.float()).mean()
    return logits, (distance * kept).sum() / kept.sum().clamp(min=1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two sets of logits over the last dimension."""
    student, teacher = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _checked(output: Output, teacher: Output | None, initial: int, name: str) -> Output:
    if teacher is None:
        raise SettingError(
            f"{name} distils from the unreduced model: pass its output as teacher, or set"
            " distill_weight=0 and token_weight=0"
        )
    same = teacher.logits.shape == output.logits.shape
    batch, length, width = teacher.features.shape
    if (
        not same
        or length < initial
        or (batch, width) != (output.features.shape[0], output.features.shape[2])
    ):
        raise SettingError(
            f"the teacher's logits {tuple(teacher.logits.shape)} and features"
            f" {tuple(teacher.features.shape)} do not fit the student's"
            f" {tuple(output.logits.shape)} and {tuple(output.features.shape)} with {initial}"
            " patches; the teacher must be the same timm model, unreduced, on the same images"
        )
    return teacher
