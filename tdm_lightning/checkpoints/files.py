"""Read a checkpoint file without running any code in it."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tdm_lightning.errors import FileError

_SCALAR = np.float64(0).__reduce__()[0]
#: Classes that official files pickle beside their weights. None of them runs code when built.
_SAFE: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)),
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its address before NumPy 2
]


def read_file(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a ``.safetensors`` or ``torch.save`` file holds, on the CPU.

    Beside tensors and plain values only what official files are known to pickle is allowed:
    ``argparse.Namespace``, paths and NumPy scalars.

    Raises:
        ValueError: if the file wants anything else, or is no checkpoint.
        FileNotFoundError: if there is no such file.
    """
    try:
        if pathlib.Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        wanted = f" (it asks for {found.group(1)})" if found else ""
        raise FileError(
            f"{path} was not loaded: it holds more than tensors and plain values{wanted}, and"
            " unpickling that could run code; ask its authors for a .safetensors file"
        ) from error
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes make the readers fail in any way
        raise FileError(
            f"{path} is not a readable checkpoint: it is cut off or damaged; get it once more"
        ) from error
    if not isinstance(content, Mapping):
        raise FileError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of weights"
        )
    return content
