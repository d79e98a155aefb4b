"""What a measurement depends on besides the methods."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

import timm
import torch

from tdm_lightning.core.checks import check_choice
from tdm_lightning.errors import SettingError
from tdm_lightning.version import __version__

#: Floating-point types by name, and by short name.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def choose_device(name: str) -> torch.device:
    """The device of a name; ``"auto"``: the accelerator if there is one, or the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = [torch.device("cpu"), *([found] if found is not None else [])]
    if name == "auto":
        return here[-1]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(
            f"device must be 'auto', 'cpu', 'cuda' or the like, got {name!r}"
        ) from None
    if device.type not in {known.type for known in here}:
        raise SettingError(
            f"there is no {device.type} device here (torch {torch.__version__}); use device=auto or"
            " device=cpu"
        )
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise SettingError(
            f"device {name!r} does not exist: there are {count} of its kind, counted from 0"
        )
    return device


def choose_dtype(name: str) -> torch.dtype:
    """The floating-point type of a name, long or short.

    Raises:
        ValueError: if it is none to compare in.
    """
    return DTYPES[check_choice(name, list(DTYPES), "precision")]


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment_facts(device: torch.device) -> dict[str, str]:
    """Device, threads, versions and the command line."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "tdm-lightning": __version__,
    }
    return {
        "device": f"{device.type}: {device_name(device)}",
        "CPU threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
    }


def _program() -> list[str]:
    """How this process was called, without its folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = "" if spec is None else spec.name.removesuffix(".__main__")
    if module == "tdm_lightning":
        return ["tdm"]
    return ["python", "-m", module] if module else [Path(sys.argv[0]).name]
