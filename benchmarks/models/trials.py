"""What is tried on a model: each trial raises where it fails."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import tdm_lightning as tdm
from benchmarks.models.tiny import SIDE
from tdm_lightning.export.files import trace_model, write_onnx
from tdm_lightning.vit.attach import reduced_vit
from tdm_lightning.vit.in_place import as_function

#: Takes a plain model, and raises where something is wrong.
Trial = Callable[[nn.Module], None]


def reduced(vit: nn.Module, rate: float) -> tdm.TokenReducedViT:
    """A copy of a model under WardTDM in two blocks."""
    return reduced_vit(copy.deepcopy(vit), tdm.WardTDM(rate, (1, 2)))


def images(count: int = 3) -> Tensor:
    """Random ones; what a model draws by itself, such as a masked autoencoder's order, is seeded
    too.
    """
    torch.manual_seed(0)
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def forward(vit: nn.Module) -> None:
    """Equal to the plain model at keep rate 1, and not below."""
    plain = as_function(vit)(images())
    _close(as_function(reduced(vit, 1.0))(images()), plain)
    fewer = as_function(reduced(vit, 0.5))(images())
    assert fewer.shape == plain.shape
    assert fewer.isfinite().all()
    assert not torch.allclose(fewer, plain, atol=1e-4)


def train(vit: nn.Module) -> None:
    """Every parameter that the plain model gives a gradient gets one."""
    found = []
    for rate in (1.0, 0.5):
        model = reduced(vit, rate).train()
        as_function(model)(images()).square().mean().backward()
        named = [*model.vit.named_parameters()]
        found.append({key for key, value in named if value.grad is not None})
        assert all(value.grad.isfinite().all() for _, value in named if value.grad is not None)
    assert found[0] == found[1] != set()


@torch.no_grad()
def half(vit: nn.Module) -> None:
    """bfloat16 stays finite."""
    model = reduced(vit, 0.5).bfloat16()
    assert as_function(model)(images().bfloat16()).isfinite().all()


@torch.no_grad()
def compiled(vit: nn.Module) -> None:
    """One graph of ``torch.compile``, without a break."""
    function = as_function(reduced(vit, 0.5))
    expected = function(images())
    torch.compiler.reset()
    _close(torch.compile(function, fullgraph=True, backend="aot_eager")(images()), expected)


@torch.no_grad()
def exported(vit: nn.Module) -> None:
    """``torch.export``, then a batch of another size."""
    function = as_function(reduced(vit, 0.5))
    program = trace_model(function, (3, SIDE, SIDE)).module()
    _close(program(images(5)), function(images(5)))


@torch.no_grad()
def onnx(vit: nn.Module) -> None:
    """ONNX Runtime, a batch of another size."""
    import onnxruntime

    function = as_function(reduced(vit, 0.5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(function, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images(5).numpy()})
    _close(torch.from_numpy(found), function(images(5)))


@torch.no_grad()
def trace(vit: nn.Module) -> None:
    """Every patch is in a token, and their number falls as asked."""
    model = reduced(vit, 0.5)
    _, told = model.trace(images())
    assert told.token_counts == [64, 32, 16, 16]
    assert [len(layer.assignment.unique()) for layer in told.layers] == [32, 16]


TRIALS = {
    "forward": forward,
    "train": train,
    "half": half,
    "compile": compiled,
    "export": exported,
    "onnx": onnx,
    "trace": trace,
}


def outcome(trial: Trial, vit: nn.Module) -> str:
    """``"yes"``, or in one line what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial(vit)
    except Exception as error:  # whatever it is, the table tells
        plain = re.sub(r"\x1b\[\d+m", "", str(error))  # without the colours of terminals
        return f"{type(error).__name__}: {plain}".splitlines()[0]
    return "yes"


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
