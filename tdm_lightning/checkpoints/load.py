"""Fit published weights to a model: all of them or none."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tdm_lightning.checkpoints.files import read_file
from tdm_lightning.checkpoints.layouts import LAYOUTS, Layout, Weights
from tdm_lightning.core.checks import check_choice
from tdm_lightning.errors import FileError, SettingTypeError
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.adapters import find_adapter

Grid = tuple[int, int]


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_official` did.

    Attributes:
        layout: the name of the file's layout.
        interpolated: the position grids of file and model, each height and width, if they differ.
        untouched: names of the model's weights that stayed as they were: a skipped classifier, or
            the own layers of a strategy for which the file has none.
    """

    layout: str
    interpolated: tuple[Grid, Grid] | None = None
    untouched: tuple[str, ...] = ()


def load_official(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    which: Literal["model", "model_ema"] = "model",
    skip_head: bool = False,
) -> LoadReport:
    """Load an official checkpoint into a timm ViT, plain or reduced. All of it or nothing.

    Files are read without running anything they contain. A position grid of another size is
    interpolated; apart from that, every name and shape must fit.

    Args:
        model: a timm ViT or what :func:`~tdm_lightning.attach` made of one; changed in place.
        path_or_state_dict: a ``.safetensors`` or ``torch.save`` file, or what such a file holds:
            weights by name, or a dictionary with the weights under ``which``, as DeiT's training
            script writes it. A checkpoint of :class:`~tdm_lightning.TokenReductionClassifier` is
            read too.
        which: the trained weights or their moving average, where a file has both. Published
            accuracies are of ``"model"``.
        skip_head: leave the model's classifier as it is, to fine-tune on other classes.

    Returns:
        What was recognised, interpolated and left alone.

    Raises:
        ValueError: if the file cannot be read safely, or holds another model; every name that does
            not fit is in the message.
        TypeError: if an argument is of the wrong kind.
        FileNotFoundError: if there is no such file.

    >>> import timm
    >>> vit = timm.create_model("test_vit", img_size=96)
    >>> other = timm.create_model("test_vit", img_size=160)
    >>> load_official(vit, {"model": other.state_dict()})
    LoadReport(layout='deit', interpolated=((10, 10), (6, 6)), untouched=())
    """
    vit: Any = model.vit if isinstance(model, TokenReducedViT) else model
    if not isinstance(vit, nn.Module) or find_adapter(vit) is None:
        raise SettingTypeError(
            "load_official() takes a timm Vision Transformer, plain or reduced, got a"
            f" {type(model).__name__}"
        )
    check_choice(which, ("model", "model_ema"), "which")
    if isinstance(path_or_state_dict, Mapping):
        origin, content = "the state dict", path_or_state_dict
    elif isinstance(path_or_state_dict, (str, os.PathLike)):
        origin, content = str(path_or_state_dict), read_file(path_or_state_dict)
    else:
        raise SettingTypeError(f"expected a path or a state dict, got {path_or_state_dict!r}")
    layout, weights = _translated(_weights(content, which, origin), origin)
    grids = _fit_position_grid(weights, vit)

    # The timm model's weights go by timm's names, a strategy's own by "strategy.…", whether the
    # model is reduced or not.
    state = {name.removeprefix("vit."): value for name, value in model.state_dict().items()}
    weights = _restacked(weights, state)
    weights = {
        name: w
        for name, w in weights.items()
        if name in state or not name.startswith(layout.auxiliary)
    }
    head = {
        name
        for name in {*weights, *state}
        if name.startswith(("head.", "head_dist.", "strategy.head_cls."))
    }
    untouched = set(head & state.keys()) if skip_head else set()
    if skip_head:
        weights = {name: value for name, value in weights.items() if name not in head}
    given = {_owner(name) for name in weights}
    untouched |= {name for name in state if _is_strategys(name) and _owner(name) not in given}
    copies = {
        copy: name
        for copy, name in layout.copies(weights).items()
        if copy not in state and name in state
    }
    wanted = {name: value for name, value in state.items() if name not in untouched}
    _check_fit(
        weights, wanted | {copy: state[name] for copy, name in copies.items()}, origin, head, copies
    )
    weights = {name: value for name, value in weights.items() if name not in copies}

    prefix = "" if model is vit else "vit."
    # Not strict, because some weights may stay untouched; everything else was compared above.
    model.load_state_dict(
        {name if _is_strategys(name) else prefix + name: w for name, w in weights.items()},
        strict=False,
    )
    return LoadReport(layout.name, grids, tuple(sorted(untouched)))


def _is_strategys(name: str) -> bool:
    return name.startswith("strategy.")


#: What stands before the names of a strategy's weights: more where it is one of a stack.
_STRATEGY = re.compile(r"strategy\.(?:members\.\d+\.)?")


def _owner(name: str) -> str:
    """The strategy, or the member of a stack, that a weight belongs to; empty for the timm
    model's.
    """
    found = _STRATEGY.match(name)
    return found[0] if found else ""


def _restacked(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
    """The weights under this model's names, where a strategy stands alone in one of the two and in
    a stack in the other.
    """
    places: dict[str, list[str]] = {}
    for name in filter(_is_strategys, state):
        places.setdefault(_STRATEGY.sub("", name, count=1), []).append(name)
    renamed = {}
    for name, value in weights.items():
        here = (
            places.get(_STRATEGY.sub("", name, count=1), [])
            if _is_strategys(name) and name not in state
            else []
        )
        free = len(here) == 1 and here[0] not in weights and here[0] not in renamed
        renamed[here[0] if free else name] = value
    return renamed


def _weights(content: Mapping[str, Any], which: str, origin: str) -> Weights:
    """The weights by name, from under ``which`` or the mapping itself, without
    DistributedDataParallel's prefix.
    """
    found = content
    if "pytorch-lightning_version" in content:
        inside = content.get("state_dict")
        if not isinstance(inside, Mapping):
            raise FileError(f"{origin} is a checkpoint of a run, but has no weights: 'state_dict'")
        found = {
            name.removeprefix("model."): value
            for name, value in inside.items()
            if isinstance(name, str) and name.startswith("model.")
        }
    elif not any(isinstance(value, Tensor) for value in content.values()):
        found = content.get(which, {})
        if not isinstance(found, Mapping) or not found:
            raise FileError(
                f"{origin} has no weights under {which!r}; its keys are"
                f" {_listed(content) or 'none'}"
            )
    strange = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise FileError(f"{origin} holds entries that are no tensors: {_listed(strange)}")
    unnamed = [name for name in found if not isinstance(name, str)]
    if unnamed:
        raise FileError(f"{origin} holds weights whose names are no text: {_listed(unnamed)}")
    unfit = [name for name, value in found.items() if not _can_be_copied(value)]
    if unfit:
        raise FileError(
            f"{origin} holds tensors that are sparse, complex, quantized or without values, where a"
            f" model needs plain ones: {_listed(unfit)}"
        )
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _can_be_copied(value: Tensor) -> bool:
    """Whether a weight of this kind can become a parameter's value; otherwise torch would stop when
    some of the others have been copied.
    """
    plain = value.layout is torch.strided and not value.is_quantized
    return plain and not (value.is_meta or value.is_complex())


def _translated(weights: Weights, origin: str) -> tuple[Layout, Weights]:
    for layout in LAYOUTS:
        if layout.recognises(weights):
            return layout, layout.translate(weights)
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise FileError(
        f"{origin} is not of a known layout ({known}); its weights are {_listed(weights, most=5)}"
    )


def _fit_position_grid(weights: Weights, vit: Any) -> tuple[Grid, Grid] | None:
    """Resize the position embedding in ``weights`` to the model's grid where only its length
    differs.
    """
    wanted, found = getattr(vit, "pos_embed", None), weights.get("pos_embed")
    if wanted is None or found is None or found.ndim != 3 or found.shape[1] == wanted.shape[1]:
        return None
    height, width = vit.patch_embed.grid_size
    prefix = wanted.shape[1] - height * width
    side = math.isqrt(max(0, found.shape[1] - prefix))
    if found.shape[2] != wanted.shape[2] or side == 0 or side * side + prefix != found.shape[1]:
        return None  # another width or other prefix tokens: the comparison that follows will say so
    weights["pos_embed"] = resample_abs_pos_embed(
        found, [height, width], [side, side], num_prefix_tokens=prefix
    )
    return (side, side), (height, width)


def _check_fit(
    weights: Weights,
    state: Mapping[str, Tensor],
    origin: str,
    head: set[str],
    copies: Mapping[str, str],
) -> None:
    """Raise one ``ValueError`` that names everything that does not fit; ``copies`` of weights must
    all be there and equal.
    """
    missing, extra = state.keys() - weights.keys(), weights.keys() - state.keys()
    other = {
        name for name in weights.keys() & state.keys() if weights[name].shape != state[name].shape
    }
    given = {copy: name for copy, name in copies.items() if {copy, name} <= weights.keys() - other}
    unlike = {copy for copy, name in given.items() if not torch.equal(weights[copy], weights[name])}
    if not missing and not extra and not other and not unlike:
        return
    lines = [f"{origin} does not fit this model; nothing was loaded."]
    held, here = _kind(weights), _kind(state)
    if held != here:
        lines.append(f"It holds another model: {held}; this one has {here}.")
    shapes = {
        f"{name} ({_shape(weights[name])} instead of {_shape(state[name])})" for name in other
    }
    for title, names in (
        ("Of another shape", shapes),
        ("Missing from the file", missing),
        ("Not in the model", extra),
        ("Copies that differ, where this model has one weight", unlike),
    ):
        if names:
            lines.append(f"{title}: {_listed(sorted(names))}.")
    if head & (missing | extra | other):
        lines.append(
            "Make the model with the file's number of classes, or pass skip_head=True to keep its"
            " own classifier."
        )
    if any(_is_strategys(name) for name in extra):
        lines.append(
            "The file holds layers of a token-reduction method: attach that method before loading."
        )
    raise FileError("\n".join(lines))


def _kind(weights: Mapping[str, Tensor]) -> str:
    """What tells ViTs apart at a glance."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    patch = weights.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        return f"{depth} blocks"
    return f"{depth} blocks, width {patch.shape[0]}, patches {patch.shape[2]}×{patch.shape[3]}"


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "scalar"


def _listed(names: Mapping[str, Any] | list[str], most: int = 30) -> str:
    shown, more = list(names)[:most], len(names) - most
    return ", ".join(map(str, shown)) + (f" and {more} more" if more > 0 else "")
