"""What a pass gives a device to do: an exact figure where a time would be noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Names, in order, of the aten operations that do work; views do none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_view(func) and "_unsafe_view" not in str(func):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether the result shares the memory of an argument without changing it."""
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def operations(function: Callable[[], Any]) -> list[str]:
    """What a call dispatches, without gradients."""
    with torch.no_grad(), Operations() as counted:
        function()
    return counted.names


def kernels(function: Callable[[], Any]) -> list[str]:
    """The kernels, copies and fills that a call has CUDA run, without gradients. A graph's are
    those inside it.
    """
    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    return [event.name for event in found.events() if event.device_type == DeviceType.CUDA]


def launches(run: Callable[[Tensor], Any], images: Tensor) -> int:
    """How many of what :func:`counted` names a pass takes, once all that is made once is there."""
    with torch.no_grad():
        run(images)
    count = kernels if images.device.type == "cuda" else operations
    return len(count(lambda: run(images)))


def counted(device: torch.device) -> str:
    """What :func:`launches` counts on a device."""
    if device.type == "cuda":
        return "kernels, copies and fills that ran on the device"
    return "dispatched aten operations that are no views"
