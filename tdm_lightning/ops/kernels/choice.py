"""Which form runs: ``"auto"``, ``"torch"`` or ``"triton"``."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from types import TracebackType
from typing import Literal, get_args

import torch

from tdm_lightning.errors import SettingError

Form = Literal["auto", "torch", "triton"]

#: The environment variable that says what is chosen before anything calls :func:`use`.
VARIABLE = "TDM_LIGHTNING_KERNELS"

#: The oldest generation of NVIDIA's GPUs that the kernels are written for: Ampere.
_OLDEST = (8, 0)

_chosen: Form | None = None


class use:
    """Choose the form for the whole process, or, as a context manager, for a while.

    Args:
        form: ``"torch"``: torch's own operations; ``"triton"``: a kernel wherever there is one,
            else one warning that says why not; ``"auto"``, the default: a kernel where torch's
            form is known to be slow and the kernel to be able.

    Raises:
        ValueError: for another word, or for ``"triton"`` where Triton is not installed.
    """

    def __init__(self, form: Form) -> None:
        global _chosen
        self.before = _chosen
        _chosen = _checked(form, "use")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self.before


def current() -> Form:
    """The form that is chosen.

    Raises:
        ValueError: if the environment variable ``TDM_LIGHTNING_KERNELS`` says something else.
    """
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def _checked(word: str, where: str) -> Form:
    if word not in get_args(Form):
        known = ", ".join(map(repr, get_args(Form)))
        raise SettingError(f"{where}: the form of the kernels is one of {known}, got {word!r}")
    if word == "triton" and find_spec("triton") is None:
        raise SettingError(
            f"{where}: Triton is not installed; run pip install 'tdm-lightning[kernels]' on Linux,"
            " or choose 'auto'"
        )
    return word  # type: ignore[return-value]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache
def unable(device: str, index: int | None) -> str | None:
    """Why kernels cannot run on a device at all; ``None``: they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'tdm-lightning[kernels]')"
    if interpreted():
        return None
    if device != "cuda":
        return (
            f"Triton's kernels run on a GPU, not on {device!r}; to try them there set"
            " TRITON_INTERPRET=1 before Python starts"
        )
    if torch.version.hip:
        return None
    if (found := torch.cuda.get_device_capability(index)) < _OLDEST:
        return f"they need compute capability {_OLDEST[0]}.{_OLDEST[1]}, this GPU has {found}"
    return None
