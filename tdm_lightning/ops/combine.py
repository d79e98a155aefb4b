"""Groups of tokens become one token each, with the sum of their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdm_lightning.ops.constants import TINY, constant, rows
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.sums import row_totals

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _refuses(
    x: Tensor, group: Tensor, weight: Tensor | None, size: Tensor, groups: int
) -> str | None:
    if x.dtype not in _FLOATS:
        return f"the kernel takes float32, float16 or bfloat16 tokens, got {x.dtype}"
    if not x.numel() or not groups:
        return "there are no tokens or no groups"
    return None


def _refuses_backward(x: Tensor, *others: Any) -> str | None:
    return None  # what the forward pass took


@in_two_forms("tdm_lightning.ops.kernels.combine:backward", _refuses_backward)
def combine_backward(
    x: Tensor, group: Tensor, weight: Tensor, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """What flows back through :func:`combine`.

    Args:
        x: tokens, B×N×C.
        group: the group of each, B×N, int64.
        weight: of each, B×N.
        out: the means, B×G×C.
        grad: what flows to them, B×G×C.

    Returns:
        What flows to ``x`` and to ``weight``, in their dtypes.
    """
    batch, groups, width = out.shape
    flat, raw, total = _shares(group, weight, None, groups)
    share = (raw / total[0].index_select(0, flat).view_as(raw)).unsqueeze(-1)
    # a dropped token's group is the row in front of its image's, which receives nothing
    received = torch.cat((grad.new_zeros(batch, 1, width), grad), dim=1).flatten(0, 1)
    received = received.index_select(0, flat).view_as(x).float()
    mean = torch.cat((out.new_zeros(batch, 1, width), out), dim=1).flatten(0, 1)
    mean = mean.index_select(0, flat).view_as(x)
    to_raw = ((x.float() - mean) * received).sum(-1) / total[0].index_select(0, flat).view_as(raw)
    return (share * received).to(x.dtype), to_raw.to(weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, group, weight, size, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.by_size = weight is None
    ctx.save_for_backward(x, group, size.detach() if weight is None else weight, output[0])


def _flow_back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, group, weight, out = ctx.saved_tensors
    through = combine_backward.form if combine.failed(x) else combine_backward.op
    to_x, to_weight = through(x, group, weight, out, grad)
    return to_x, None, None if ctx.by_size else to_weight, None, None


@in_two_forms(
    "tdm_lightning.ops.kernels.combine:combine",
    _refuses,
    setup_context=_save,
    backward=_flow_back,
)
def combine(
    x: Tensor, group: Tensor, weight: Tensor | None, size: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Every group becomes the weighted mean of its tokens, which stands for all they stand for.

    The weights are normalised here, in float32, and the means summed so. Of a group whose weights
    are all zero it is the plain mean; a token alone in its group keeps its value exactly. Gradient
    flows to ``x`` and ``weight``.

    Args:
        x: tokens, B×N×C.
        group: the group of each token in ``0…groups-1``, B×N, int64; -1 for one that is dropped.
        weight: of each token in its group, non-negative, B×N; ``None``: its size, so that every
            group becomes the mean of its patches.
        size: patches that each token stands for, B×N.
        groups: number of groups G; an empty one gives a zero token of size 0.

    Returns:
        Combined tokens, B×G×C, in ``x``'s dtype; their sizes, B×G, in that of ``size``.

    >>> x, group = torch.tensor([[[1.0], [5.0], [7.0]]]), torch.tensor([[0, 0, 1]])
    >>> combine(x, group, torch.tensor([[3.0, 1.0, 0.0]]), torch.ones(1, 3), 2)
    (tensor([[[2.],
             [7.]]]), tensor([[2., 1.]]))
    """
    batch, _, width = x.shape
    flat, raw, total = _shares(group, weight, size, groups)
    share = raw / total[0].index_select(0, flat).view_as(raw)
    weighted = (x * share.unsqueeze(-1)).flatten(0, 1)
    out = row_totals(weighted, flat, batch, groups + 1)
    out = out.view(batch, groups + 1, width)[:, 1:]
    sizes = total[-1].view(batch, groups + 1)[:, 1:].detach()
    return out.to(x.dtype), sizes.to(size.dtype)


def _shares(
    group: Tensor, weight: Tensor | None, size: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a table that has one in front of every image's groups, for dropped tokens.

    Returns:
        The row of every token, B·N; weights that are above zero, B×N, float32; the sums of these
        and, where they are others, of the sizes in each row, 1 or 2×(B·(G+1)), float32.
    """
    batch = group.shape[0]  # no len(): it would fix an exported program's batch size
    here = constant(lambda: rows(batch, groups + 1, group) + 1, group, "combine", batch, groups)
    flat = (group + here).flatten()
    if weight is None:
        assert size is not None
        raw = size.detach().float()
        summed = raw.flatten().unsqueeze(0)
    else:
        tiny = constant(lambda: torch.full((1,), TINY, device=group.device), group, "tiny")
        raw = weight + tiny  # a vector of float32: the sum is one, whatever the weights are
        summed = raw.flatten().unsqueeze(0)
        if size is not None:
            summed = torch.stack((raw, size.detach())).flatten(1)
    return flat, raw, row_totals(summed, flat, batch, groups + 1, dim=1)
