"""What a reduced model learns from the unreduced one: its logits, and its features of the patches
that are left.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.tokens import Output
from tdm_lightning.errors import SettingError
from tdm_lightning.ops import merge_groups


def distillation(
    output: Output,
    teacher: Output | None,
    initial: int,
    kept: Tensor | None,
    name: str,
    token_loss: Literal["mse", "kl"] = "mse",
) -> tuple[Tensor, Tensor]:
    """How far a training pass is from the teacher's, in logits and in patch tokens (Rao et al.,
    DynamicViT, 2021, §3.3).

    Args:
        output: the student's pass. Where tokens were merged, its ``carry["holder"]`` is the token
            that holds each patch, B×N0.
        teacher: the same timm model's pass on the same images, unreduced.
        initial: N0, number of patches.
        kept: which of the patches are still there, B×N0, without gradient; ``None``: all. Not
            asked where tokens were merged.
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
    holder = output.carry.get("holder")
    if holder is None:
        student = student[:, :initial]
        kept = student.new_ones(student.shape[:2]) if kept is None else kept
    else:
        even = torch.ones_like(holder, dtype=torch.float32)
        count = even.new_zeros(student.shape[:2]).scatter_add(1, holder, even)
        wanted = merge_groups(wanted, holder, 1 / count.gather(1, holder), student.shape[1])
        kept = torch.ones_like(count)
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
