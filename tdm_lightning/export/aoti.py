"""Programs that AOTInductor compiles ahead of time, for the CPU and the torch of this machine.

Its functions have an underscore in their path, so they are named here only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tdm_lightning.errors import SettingError


def save_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile a program and write the package.

    Raises:
        ValueError: if there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package

    try:
        aoti_compile_and_package(program, package_path=str(path))
    except RuntimeError as error:
        if "InvalidCxxCompiler" not in f"{type(error).__name__}: {error}":
            raise
        raise SettingError(
            "AOTInductor compiles C++ and found no compiler for it: install g++ or clang++, or name"
            " yours in the environment variable CXX; format pt2 needs none"
        ) from error


def load_package(path: Path) -> Callable[[Tensor], Tensor]:
    """What a package computes, from images to logits."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))
