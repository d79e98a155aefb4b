"""An operation in two forms, and what decides between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, update_wrapper
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from tdm_lightning.errors import SettingError, TokenReductionError
from tdm_lightning.ops.kernels.choice import current, unable

P = ParamSpec("P")
R = TypeVar("R")

#: Says of an operation's arguments why its kernel does not take them; ``None``: it does.
Refuses = Callable[..., str | None]


class Operation(Generic[P, R]):
    """An operation in torch's form, and the same in Triton's.

    Eager passes without gradients launch the kernel at once; compiled ones and those with
    gradients go through an operator of ``torch.library``, so that a graph holds it in one piece. A
    kernel that fails is replaced by torch's form for the rest of the process, with one warning.

    Args:
        form: torch's form: a pure function of tensors and numbers, with annotated arguments, the
            first a tensor. It also tells shapes to compilers.
        kernel: where the kernel's launcher is, ``"module:function"``, with the same arguments;
            imported when it first runs.
        refuses: see :data:`Refuses`.
        auto: whether ``"auto"`` takes it, for arguments that it does not refuse.
        setup_context: with ``backward``, as ``torch.library.register_autograd`` wants them;
            ``None``: nothing flows back.
        backward: see ``setup_context``.
    """

    def __init__(
        self,
        form: Callable[P, R],
        kernel: str,
        refuses: Refuses,
        auto: bool,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.form: Callable[..., R] = form
        self.kernel, self.auto = kernel, auto
        self.refuses, self.differentiable = refuses, backward is not None
        self.name = form.__name__
        update_wrapper(self, cast(Any, form))
        schema = torch.library.infer_schema(form, mutates_args=())
        self.op = torch.library.custom_op(
            f"tdm_lightning::{self.name}", self._run, mutates_args=(), schema=schema
        )
        self.op.register_fake(lambda *args: _contiguous(self.form(*args)))
        if backward is not None:
            self.op.register_autograd(backward, setup_context=setup_context)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result, in the form that is chosen.

        Raises:
            ValueError: if kernels are asked for where none can run.
        """
        assert not kwargs, "arguments by position: the operator takes them so"
        if not self.runs(*args):
            return self.form(*args)
        recorded = self.differentiable and torch.is_grad_enabled()
        if recorded or torch.compiler.is_compiling():
            return self.op(*args)
        return self._run(*args)

    def runs(self, *args: Any) -> bool:
        """Whether the kernel takes these arguments.

        Raises:
            ValueError: if kernels are asked for where none can run.
        """
        form, first = current(), args[0]
        if form == "torch" or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        device = first.device
        if device.type == "meta" or (form == "auto" and not (self.auto and first.is_cuda)):
            return False
        reason = _unable(device.type, device.index)
        if reason is not None:
            if form == "triton":
                raise SettingError(f"kernels 'triton' are chosen, but {reason}; or choose 'auto'")
            return False
        reason = self.refuses(*args)
        if reason is not None and form == "triton":
            _warn(f"{self.name} takes torch's form: {reason}")
        return reason is None

    def failed(self, like: Tensor) -> bool:
        """Whether the kernel failed before, on the kind of device of ``like``."""
        return (self.name, like.device.type) in _failed

    def _run(self, *args: Any) -> Any:
        where = (self.name, args[0].device.type)
        if where not in _failed:
            module, function = self.kernel.split(":")
            try:
                return getattr(import_module(module), function)(*args)
            except (torch.OutOfMemoryError, TokenReductionError):  # not the kernel's fault
                raise
            except Exception as error:  # whatever a compiler or a driver comes up with
                _failed.add(where)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(
                    f"the kernel of {self.name} failed on {where[1]!r} and torch's form runs from"
                    f" here on: {reason}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return _contiguous(self.form(*args))


#: Operations whose kernel failed, each with the kind of device.
_failed: set[tuple[str, str]] = set()


def in_two_forms(
    kernel: str,
    refuses: Refuses,
    auto: bool = True,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make an :class:`Operation` of torch's form; arguments as there."""
    return lambda form: Operation(form, kernel, refuses, auto, setup_context, backward)


@torch.compiler.assume_constant_result
def _unable(device: str, index: int | None) -> str | None:
    return unable(device, index)


@torch.compiler.assume_constant_result
def _warn(message: str) -> bool:
    return _warned(message)


@lru_cache(maxsize=256)
def _warned(message: str) -> bool:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
    return True


def _contiguous(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.contiguous()
    return tuple(part.contiguous() for part in found)
