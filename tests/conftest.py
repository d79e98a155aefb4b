"""Deterministic, single-threaded tests, and the golden tensors of the official implementations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Facts and tensors recorded from an official implementation, by the folder's name under ``tests/golden``."""

    def load(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        folder = Path(__file__).parent / "golden" / name
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        return json.loads((folder / "facts.json").read_text()), tensors

    return load
