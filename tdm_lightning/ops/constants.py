"""Small tensors that every pass needs again, made once for each device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Added to every weight before it is normalised: a group whose attention underflows to zero becomes
#: a plain mean.
TINY = 1e-12
#: So many are kept; then all are made anew. Images of many sizes would fill the memory otherwise.
_MOST = 1024
_kept: dict[tuple[object, ...], Tensor] = {}


def constant(make: Callable[[], Tensor], like: Tensor, *key: object) -> Tensor:
    """What ``make()`` gives, from an earlier call with this key where that can be.

    It cannot be while a graph is made of the pass, or a tensor is none that holds numbers: then it
    is made.

    Args:
        make: makes the tensor on the device of ``like``; the same for equal keys.
        like: a tensor of the pass.
        key: what tells constants apart, on one device.

    Returns:
        A tensor that nobody may write to.
    """
    if not _holds_numbers(like):
        return make()
    whole = (like.device, *key)
    found = _kept.get(whole)
    if found is None:
        with torch.inference_mode(False):  # the next pass may be one with gradients
            found = make()
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[whole] = found
    return found


def places(n: int, like: Tensor) -> Tensor:
    """``0…n-1``, int64, on the device of ``like``.

    >>> places(3, torch.ones(1))
    tensor([0, 1, 2])
    """
    return constant(lambda: torch.arange(n, device=like.device), like, "places", n)


def rows(batch: int, n: int, like: Tensor) -> Tensor:
    """Where each sequence begins in a batch of them laid end to end, B×1, int64.

    Args:
        batch: number of sequences.
        n: length of each.
        like: gives the device.

    >>> rows(3, 10, torch.ones(1)).tolist()
    [[0], [10], [20]]
    """
    made = lambda: torch.arange(batch, device=like.device).unsqueeze(1) * n  # noqa: E731
    return constant(made, like, "rows", batch, n)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros that take no memory, of the dtype of ``like`` and on its device: what is added out of
    place needs no table of them.

    >>> zeros(torch.ones(1), 2, 3).shape
    torch.Size([2, 3])
    """
    return constant(lambda: like.new_zeros(1), like, "zero", like.dtype).expand(shape)


def _holds_numbers(x: Tensor) -> bool:
    if type(x) is not Tensor or x.is_meta:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
