"""Attention with a bias for every key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.precision import full_precision

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: The widest head that the kernel takes.
_WIDEST = 128
#: To a multiple of this many numbers the fused kernels on a GPU want a bias to be laid out.
_ALIGNED = 8


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention with a bias for every key.

    Under autocast in its type. No gradient flows through the kernel to the bias: one that wants it
    takes torch's form.

    Args:
        q: queries, B×H×T×d, mostly views into a packed projection.
        k: keys, B×H×S×d.
        v: values, B×H×S×d.
        bias: added to the logits of every key, B×1×1×S, of any float type; -1e4 hides a key.
        scale: factor on the products of queries and keys.

    Returns:
        B×H×T×d, laid out as B×T×H×d, so that ``.transpose(1, 2).flatten(2)`` copies nothing.

    >>> q = k = torch.zeros(1, 1, 2, 1)
    >>> v = torch.tensor([[[[1.0], [5.0]]]])
    >>> biased_attention(q, k, v, torch.tensor([[[[3.0, 1.0]]]]).log(), 1.0).flatten()
    tensor([2., 2.])
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return attention_by_rows(q, k, v, bias, scale).transpose(1, 2)


def _refuses(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> str | None:
    width = q.shape[-1]
    if width % 8 or width > _WIDEST:
        return f"the kernel takes heads of a multiple of 8 and at most {_WIDEST}, got {width}"
    if v.shape != k.shape:
        return f"keys are {tuple(k.shape)} and values {tuple(v.shape)}"
    if q.dtype not in _FLOATS or {k.dtype, v.dtype} != {q.dtype}:
        return (
            "the kernel takes queries, keys and values of one type, float32, float16 or bfloat16,"
            f" got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.numel() or not k.numel():
        return "there are no tokens"
    if bias.shape != (len(k), 1, 1, k.shape[2]):
        return (
            f"the kernel takes a bias for every key, {len(k)}×1×1×{k.shape[2]}, got"
            f" {tuple(bias.shape)}"
        )
    if bias.requires_grad and torch.is_grad_enabled():
        return "no gradient flows to the kernel's bias, and this one wants it"
    return None


def _refuses_backward(q: Tensor, *others: Any) -> str | None:
    return None  # what the forward pass took


@in_two_forms("tdm_lightning.ops.kernels.attention:backward", _refuses_backward, auto=False)
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What flows back through :func:`attention_by_rows`.

    Args:
        q: as there, as ``k``, ``v``, ``bias`` and ``scale``.
        k: keys.
        v: values.
        bias: of every key.
        scale: of the products.
        out: what it gave, B×T×H×d.
        grad: what flows to that, B×T×H×d.

    Returns:
        What flows to ``q``, ``k`` and ``v``, B×T×H×d and B×S×H×d, in their dtype.
    """
    asks, keys, values = q.float(), k.float(), v.float()
    flow, result = grad.transpose(1, 2).float(), out.transpose(1, 2).float()
    with full_precision(q.device):
        weights = (asks * scale @ keys.transpose(-2, -1) + bias).softmax(dim=-1)
        gain = flow @ values.transpose(-2, -1) - (flow * result).sum(-1, keepdim=True)
        gain = weights * gain * scale  # of the products of queries and keys
        found = gain @ keys, gain.transpose(-2, -1) @ asks, weights.transpose(-2, -1) @ flow
    to_q, to_k, to_v = (part.transpose(1, 2).to(q.dtype) for part in found)
    return to_q, to_k, to_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, output)


def _flow_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out = ctx.saved_tensors
    failed = attention_by_rows.failed(q)
    through = attention_backward.form if failed else attention_backward.op
    found = through(q, k, v, bias, ctx.scale, out, grad)
    return *(part.transpose(1, 2) for part in found), None, None


@in_two_forms(
    "tdm_lightning.ops.kernels.attention:attention_by_rows",
    _refuses,
    auto=False,  # not measured; SDPA is the default
    setup_context=_save,
    backward=_flow_back,
)
def attention_by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """:func:`biased_attention` as it lies in memory, B×T×H×d."""
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=_aligned(bias, q), scale=scale)
    return found.transpose(1, 2)


def _aligned(bias: Tensor, like: Tensor) -> Tensor:
    """The bias in the dtype of ``like``, on a GPU laid out in rows of a multiple of 8: others take
    a slower kernel, or crash a compiled model.
    """
    length = bias.shape[-1]
    bias = bias.to(like.dtype)
    if like.device.type == "cpu" or not length % _ALIGNED:
        return bias
    return F.pad(bias, (0, -length % _ALIGNED))[..., :length]
