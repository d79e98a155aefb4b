"""Find the ViT inside any module, and watch its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tdm_lightning.errors import SettingError
from tdm_lightning.vit.adapters import adapter_for, find_adapter
from tdm_lightning.vit.in_place import reduced_in_place
from tdm_lightning.vit.wrapper import HookPoint, TokenReducedViT

#: Called with a block's index, from 0, the tokens after it, B×T×C, prefix tokens first, and which
#: rows of them are no padding, B×T, bool, or ``None``: all.
See = Callable[[int, Tensor, Tensor | None], None]


def find_vit(module: nn.Module, path: str | None = None) -> nn.Module:
    """The one ViT inside a module: a reduced model, or a plain timm ViT (see
    :data:`~tdm_lightning.vit.families.VIT_CLASSES`).

    A reduced model stands for the timm model inside it, also where that hangs on the module a
    second time.

    Args:
        module: any module, such as a LightningModule.
        path: where to look, as ``module.get_submodule`` takes it, for a module that holds several
            (student and teacher, say).

    Raises:
        ValueError: if there is none, or several and no path says which; the message lists their
            paths.

    >>> import timm
    >>> type(find_vit(nn.ModuleDict({"encoder": timm.create_model("test_vit")}))).__name__
    'VisionTransformer'
    """
    found = find_vits(module, path)
    if len(found) == 1:
        return next(iter(found.values()))
    where = type(module).__name__ + (f".{path}" if path else "")
    if not found:
        raise SettingError(
            f"found no ViT in {where}: expected one timm ViT, or what attach() returns, among its"
            " submodules"
        )
    paths = ", ".join(f"{name!r} ({type(inner).__name__})" for name, inner in found.items())
    raise SettingError(
        f"found {len(found)} ViTs in {where}, expected one: {paths}; say which by its path"
    )


def find_vits(module: nn.Module, path: str | None = None) -> dict[str, nn.Module]:
    """All ViTs inside a module by their paths, see :func:`find_vit`; reduced ones first.

    Raises:
        ValueError: if there is nothing at ``path``.
    """
    start = path or ""
    try:
        root = module.get_submodule(start)
    except AttributeError as error:
        raise SettingError(f"{type(module).__name__} has no submodule {start!r}: {error}") from None
    inside = {".".join(filter(None, (start, name))): inner for name, inner in root.named_modules()}
    reduced: dict[str, nn.Module] = {}
    for name, inner in inside.items():
        found = inner if isinstance(inner, TokenReducedViT) else reduced_in_place(inner)
        if found is not None:
            reduced[name] = found
    covered = {id(inner) for model in reduced.values() for inner in model.modules()}
    plain = {
        name: inner
        for name, inner in inside.items()
        if find_adapter(inner) is not None and id(inner) not in covered
    }
    return {**reduced, **plain}


def replace_submodule(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one submodule in the place of another, wherever that hangs; other reduced models keep
    theirs.
    """
    for parent in [inner for inner in module.modules() if not isinstance(inner, TokenReducedViT)]:
        for name, child in list(
            parent._modules.items()
        ):  # under each of its names, which named_children() would not give
            if child is old:
                setattr(parent, name, new)


def inner_vit(model: nn.Module) -> Any:
    """The timm model of a reduced one; a plain one is its own."""
    return model.vit if isinstance(model, TokenReducedViT) else model


@contextmanager
def hook_blocks(vit: nn.Module, see: See) -> Iterator[None]:
    """Show ``see`` the tokens after each block of every pass inside the context; the hooks are
    removed with it.

    The hook points of a reduced model and the blocks of a plain one give the same tokens in the
    same place. Code that was compiled before does not know of the hooks and shows nothing; copies
    of the model show nothing either.
    """
    points: Any = (
        vit.hook_points if isinstance(vit, TokenReducedViT) else adapter_for(vit).blocks(vit)
    )
    handles = [
        point.register_forward_hook(_hook(point, see, index)) for index, point in enumerate(points)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(point: nn.Module, see: See, index: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def show(module: nn.Module, inputs: Any, tokens: Tensor) -> None:
        if module is point:  # a copy of the model takes its hooks along
            see(index, tokens, inputs[1] if isinstance(point, HookPoint) else None)

    return show
