"""Deterministic, single-threaded tests, and the golden tensors of the official implementations."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on the CPU

import functools
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("repeatable")
torch.set_num_threads(1)


#: What takes long: whole benchmarks, programs of exporters, kernels in the interpreter, browsers,
#: models of real width, runs that are cut off.
_SLOW_FOLDERS = ("benchmarks", "export", "ops/kernels")
_SLOW_FILES = ("training/test_faults.py",)
_SLOW_NAMES = ("export", "compile", "onnx", "browser", "real_width")
#: Of these the longest, several processes in a test or a program of every model, but for some.
_NIGHTLY_FILES = ("training/test_sharded.py", "training/test_many_machines.py")
_NIGHTLY_FILES += ("data/test_streams_over_nodes.py", "test_docs.py")
_NIGHTLY_FILES += ("vit/test_huggingface.py", "export/test_operators.py")
_EACH_PUSH = ("test_torchrun", "test_what_cannot", "test_fsdp1", "parameters[TDM", "to_a_file")
_EACH_PUSH += ("[vit]", "[beit]", "[dinov3]", "has[TDM", "has[WardTDM", "has[ToMe", "has[EViT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is left out of ``pytest`` and run by ``pytest -m slow``; as nightly what of
    that a push need not wait for.
    """
    for item in items:
        place = item.path.as_posix()
        in_folder = any(f"/tests/{folder}/" in place for folder in _SLOW_FOLDERS)
        named = "/tests/" in place and any(word in item.name for word in _SLOW_NAMES)
        in_file = place.endswith(tuple(f"/tests/{file}" for file in _SLOW_FILES))
        if in_folder or in_file or named:
            item.add_marker(pytest.mark.slow)
        long = place.endswith(tuple(f"/tests/{file}" for file in _NIGHTLY_FILES))
        if (
            long
            and item.get_closest_marker("slow")
            and not any(word in item.name for word in _EACH_PUSH)
        ):
            item.add_marker(pytest.mark.nightly)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again, and tracing, which
    makes many objects, is a tenth faster.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_wait_for_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of parquet files end without the five seconds that ``datasets`` gives its threads."""
    from datasets import config

    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Facts and tensors recorded from an official implementation, by the folder's name under
    ``tests/golden``.
    """

    def load(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        folder = Path(__file__).parent / "golden" / name
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        tensors = {  # halves are exact numbers of single precision
            key: value.float() if value.dtype == torch.float16 else value
            for key, value in tensors.items()
        }
        images = [tensors.pop(name) for name in sorted(tensors) if name.startswith("input.")]
        if images:  # too large for one file
            tensors["input"] = torch.stack(images)
        return json.loads((folder / "facts.json").read_text()), tensors

    return load


@pytest.fixture(params=["torch", "triton"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs on torch's operations, then on Triton's kernels in the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with tdm.kernels.use(request.param):
        yield request.param


@pytest.fixture(scope="session")
def official(
    golden: Callable[..., Any],
) -> Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor], tdm.TokenReducedViT]]:
    """A golden case's facts and tensors, and a timm model under a strategy with the official
    weights.
    """

    def build(
        name: str, strategy: tdm.Strategy, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], tdm.TokenReducedViT]:
        facts, tensors = golden(name)
        arguments = {
            key: value
            for key, value in facts["constructor"].items()
            if not key.endswith("layernorm_eps")
        }
        norm = functools.partial(torch.nn.LayerNorm, eps=facts["constructor"]["layernorm_eps"])
        model = tdm.attach(
            VisionTransformer(norm_layer=norm, **arguments, **kwargs), strategy
        ).eval()
        tdm.checkpoints.load_official(
            model,
            {key[11:]: value for key, value in tensors.items() if key.startswith("state_dict.")},
        )
        return facts, tensors, model

    return build
