"""How much memory a forward pass needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside the context and are still alive.

    Storages are followed, not tensors, so views cost nothing, be they of what existed before or of
    what is counted already. What a kernel allocates and frees within itself is not seen.

    Attributes:
        now: bytes alive.
        peak: the most bytes ever alive at once.

    >>> with LiveTensors() as live:
    ...     x = torch.zeros(1000)
    ...     x = x.view(10, 100) + 1
    >>> live.now, live.peak
    (4000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # address → bytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and note what it allocated."""
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in given and address not in self._known:
                self._known[address] = size
                self.now += size
                weakref.finalize(storage, self._release, address).atexit = False
        self.peak = max(self.peak, self.now)
        return result

    def _release(self, address: int) -> None:
        self.now -= self._known.pop(address)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each storage once."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a training pass saves for its backward pass, weights left out; each
    storage counts once.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    alive: set[int] = set()  # addresses of what was counted; they are used again once it is gone
    total = 0

    nothing = torch.empty(0)

    def pack(
        tensor: Tensor,
    ) -> Tensor:  # nothing is kept: there will be no backward pass, and a large batch would not fit
        nonlocal total
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in weights and address not in alive:
            alive.add(address)
            total += storage.nbytes()
            weakref.finalize(storage, alive.discard, address).atexit = False
        return nothing

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: nothing):
        model(images)
    return total


@torch.no_grad()
def peak_bytes(model: nn.Module, images: Tensor) -> int:
    """The model's weights, and on top of them the most that a forward pass holds at once.

    On CUDA the second part is what the allocator counts, elsewhere what :class:`LiveTensors` does.
    The images are not included, and other models on the device do not matter.
    """
    device = images.device
    if device.type != "cuda":
        with LiveTensors() as live:
            model(images)
        return weight_bytes(model) + live.peak
    model(images)  # libraries keep their workspaces after the first pass
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(images)
    torch.cuda.synchronize(device)
    return weight_bytes(model) + torch.cuda.max_memory_allocated(device) - before
