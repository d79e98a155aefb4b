"""A forward pass as one CUDA graph: what small batches gain most by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.vit.wrapper import TokenReducedViT

#: Passes before the capture: libraries choose and kernels are compiled in them.
_WARMUP = 3


def accelerate(model: nn.Module, example: Tensor) -> Accelerated:
    """The model, with its forward pass captured as one CUDA graph.

    A reduced model launches a few hundred small kernels, and at a small batch the time to launch
    them is what a pass takes. A graph launches all of them at once. Calls with the shape, dtype and
    device of the example replay it; all others run the model as it is, see :class:`Accelerated`.
    On a CPU there is nothing to capture, and every call does.

    Args:
        model: a reduced model, a plain ViT or any other module, ready for evaluation.
        example: images as later calls will bring them, on the model's device; their values do not
            matter. Under ``torch.autocast`` the graph is one of autocast's pass.

    Raises:
        TypeError: if the model is no module or the example no tensor.
        ValueError: if the model is in training mode or on another device, its number of tokens
            depends on the image, or CUDA cannot capture it.

    >>> import timm
    >>> vit = timm.create_model("test_vit", num_classes=5).eval()
    >>> accelerate(vit, torch.zeros(1, 3, 160, 160))(torch.zeros(2, 3, 160, 160)).shape
    torch.Size([2, 5])
    """
    if not isinstance(model, nn.Module) or not isinstance(example, Tensor):
        found = f"{type(model).__name__} and {type(example).__name__}"
        raise SettingTypeError(f"accelerate() takes a module and a batch of images, got {found}")
    return Accelerated(model, example)


class Accelerated(nn.Module):
    """A model that replays a captured pass where it can. Made by :func:`accelerate`.

    It runs eagerly for images of another shape, dtype or device, in training mode, where gradients
    are wanted (use ``torch.no_grad`` or ``torch.inference_mode``), under another autocast, and
    while something else traces or compiles it.

    The graph reads the weights where they lay when it was captured. Weights that are changed in
    place, as optimizers and ``load_state_dict`` do, are seen; weights that are replaced, and new
    settings of a strategy, are not until :meth:`refresh`. Moving or casting this module lets the
    graph go, and a copy has none. Calls must not overlap, on different streams, say: all use the
    same memory.

    Attributes:
        model: the model itself.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._graph: _Graph | None = None
        self.refresh(example)

    @property
    def captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def refresh(self, example: Tensor) -> None:
        """Capture the pass anew, as :func:`accelerate` does."""
        self._graph = None
        _check(self.model, example)
        if _has_graphs(example.device):
            self._graph = _capture(self.model, example)

    def forward(self, images: Tensor) -> Any:
        """What the model makes of images, B×C×H×W."""
        graph = self._graph
        if graph is None or not self._replays(graph, images):
            return self.model(images)
        return graph.replay(images)

    def _replays(self, graph: _Graph, images: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.model.training:
            return False
        if torch.is_grad_enabled() and (
            images.requires_grad or any(weight.requires_grad for weight in self.parameters())
        ):
            return False
        return graph.kind == _kind(images)

    def _apply(self, fn: Any, recurse: bool = True) -> Accelerated:
        self._graph = None  # it reads memory that the weights leave
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graph": None}


class _Graph:
    """A captured pass with the memory that it reads and writes."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.kind = _kind(example)
        self.images = torch.empty_like(example)
        self.images.copy_(example)
        here = torch.cuda.current_stream(example.device)
        aside = torch.cuda.Stream(example.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARMUP):
                model(self.images)
        here.wait_stream(aside)
        # What the graph reads must not be freed before it, whoever else lets go of it.
        self.read = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = model(self.images)

    def replay(self, images: Tensor) -> Any:
        """The pass on other images; what it returns is the caller's own."""
        self.images.copy_(images)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.output)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _capture(model: nn.Module, example: Tensor) -> _Graph:
    autocast = torch.autocast(
        "cuda",
        torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,  # what is cast once would lie outside the graph
    )
    try:
        with (
            torch.cuda.device(example.device),
            torch.inference_mode(False),  # later passes may run without it
            torch.no_grad(),
            autocast,
        ):
            return _Graph(model, example.detach())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise SettingError(
            f"CUDA cannot capture a pass of {type(model).__name__}, because it waits for the"
            f" device, say, or does not run at all; run it without accelerate(): {error}"
        ) from error


def _check(model: nn.Module, example: Tensor) -> None:
    """Refuse what cannot be captured, on any device."""
    name = type(model).__name__
    if model.training:
        raise SettingError(
            f"{name} is in training mode, and accelerate() captures passes of inference; call"
            " model.eval() first"
        )
    for inner in model.modules():
        if isinstance(inner, TokenReducedViT) and inner.strategy.adaptive:
            strategy = type(inner.strategy).__name__
            raise SettingError(
                f"{strategy} keeps another number of tokens for each image, and a graph has fixed"
                " shapes; take a strategy with a fixed budget, such as TDM, EViT or"
                f" SPViT(fixed_count=True), or run {strategy} without accelerate()"
            )
    weight = next(model.parameters(), None)
    if weight is not None and weight.device != example.device:
        raise SettingError(
            f"{name} is on {weight.device} and the example on {example.device}; move one of them"
        )


def _kind(images: Tensor) -> tuple[Any, ...]:
    """What images must have in common with the example."""
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return images.shape, images.dtype, images.device, precision
