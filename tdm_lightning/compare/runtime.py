"""What runs a model's forward pass: PyTorch as it is, compiled, or ONNX Runtime."""

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

RUNTIMES = ("eager", "compile", "onnx")

#: A forward pass: images, B×C×H×W, to logits.
Run = Callable[[Tensor], Any]


def check_runtime(runtime: str, device: torch.device, dtype: torch.dtype) -> str:
    """A runtime that can run on a device in a floating-point type.

    Raises:
        ValueError: if there is none of that name, or it cannot.
    """
    if check_choice(runtime, RUNTIMES, "runtime") == "onnx" and (
        device.type != "cpu" or dtype != torch.float32
    ):
        raise SettingError(
            f"runtime=onnx runs on the CPU in float32, not on {device} in {dtype}; use device=cpu"
            " and dtype=float32"
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
    return _session(model) if runtime == "onnx" else model


def runtime_name(runtime: str) -> str:
    """The runtime as a reader of the table knows it."""
    if runtime == "onnx":
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__}"
    return "torch.compile, one graph for each batch size" if runtime == "compile" else "eager"


def _compiled(model: nn.Module) -> Run:
    def run(images: Tensor) -> Tensor:
        return model(images)

    # Graphs are kept by code object, a few for each: with one of its own no method uses up
    # another's, or searches them.
    run.__code__ = run.__code__.replace()
    return torch.compile(run, fullgraph=True, dynamic=False)


def _session(model: nn.Module) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, path)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]
