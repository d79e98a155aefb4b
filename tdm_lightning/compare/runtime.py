"""What runs a model's forward pass: PyTorch as it is, compiled, CUDA graphs, or ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.checks import check_choice
from tdm_lightning.errors import SettingError
from tdm_lightning.export import check_static, write_onnx
from tdm_lightning.vit import accelerate

RUNTIMES = ("eager", "compile", "graph", "onnx")

#: A forward pass: images, B×C×H×W, to logits.
Run = Callable[[Tensor], Any]


def check_runtime(runtime: str, device: torch.device, dtype: torch.dtype) -> str:
    """A runtime that can run on a device in a floating-point type.

    Raises:
        ValueError: if there is none of that name, or it cannot.
    """
    check_choice(runtime, RUNTIMES, "runtime")
    if runtime == "graph" and device.type != "cuda":
        raise SettingError(
            f"runtime=graph captures CUDA graphs, and the device is {device}; use device=cuda, or"
            " runtime=eager or compile"
        )
    if runtime == "onnx" and (device.type != "cpu" or dtype != torch.float32):
        raise SettingError(
            f"runtime=onnx runs on the CPU in float32, not on {device} in {dtype}; use device=cpu"
            " and precision=float32"
        )
    return runtime


def check_runs(model: nn.Module, runtime: str) -> None:
    """Whether a runtime takes a model; only eager ones take shapes that depend on the image.

    Raises:
        ValueError: if it does not.
    """
    if runtime != "eager":
        check_static(model)


def runner(model: nn.Module, runtime: str) -> Run:
    """The model's forward pass in a runtime. ONNX Runtime gets as many threads as torch has.

    Args:
        model: in evaluation mode.
        runtime: of :data:`RUNTIMES`.

    Raises:
        ValueError: if the model cannot be exported, see :func:`~tdm_lightning.export.write_onnx`.
    """
    if runtime == "compile":
        return _compiled(model)
    if runtime == "graph":
        return _captured(model)
    return _session(model) if runtime == "onnx" else model


def runtime_name(runtime: str) -> str:
    """The runtime as a reader of the table knows it."""
    if runtime == "onnx":
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__}"
    names = {
        "compile": "torch.compile, one graph for each batch size",
        "graph": "a CUDA graph of the eager pass for each batch size, copies in and out included",
    }
    return names.get(runtime, runtime)


def _compiled(model: nn.Module) -> Run:
    def run(images: Tensor) -> Tensor:
        return model(images)

    # Graphs are kept by code object, a few for each: with one of its own no method uses up
    # another's, or searches them.
    run.__code__ = run.__code__.replace()
    return torch.compile(run, fullgraph=True, dynamic=False)


def _captured(model: nn.Module) -> Run:
    graphs: dict[torch.Size, nn.Module] = {}

    def run(images: Tensor) -> Tensor:
        if images.shape not in graphs:
            graphs[images.shape] = accelerate(model, images)
        return graphs[images.shape](images)

    return run


def _session(model: nn.Module) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, path)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]
