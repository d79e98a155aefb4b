"""From masks to small dense layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.sparsity.base import Sparsity
from tdm_lightning.sparsity.structured import Structured

#: Indices of the heads and of the MLP units that a block keeps.
Parts = tuple[list[int], list[int]]


def sparsities(model: Any) -> list[Sparsity]:
    """The masks of a reduced model's strategy."""
    return [
        module
        for module in getattr(model, "strategy", nn.Module()).modules()
        if isinstance(module, Sparsity)
    ]


def apply_masks(model: Any) -> None:
    """Set the masked weights of a reduced model to zero, in place. Training does so by itself.

    Raises:
        TypeError: if the model has no masks.
    """
    for masks in _required(model):
        masks.enforce(model.vit)


def adopt_masks(model: Any) -> None:
    """Read the masks off weights that are sparse already, such as those of an official file that
    was loaded into the model.

    Raises:
        TypeError: if the model has no masks.
        ValueError: if the weights leave a block without a head or MLP unit.
    """
    for masks in _required(model):
        masks.adopt(model.vit)


def active_parameters(model: Any) -> int:
    """Parameters of the timm model that no mask takes out, as the papers count them.

    S²ViTE's table counts the biases of removed heads and units and the whole ``attn.proj``; the
    model that :func:`extract_dense` returns is smaller still.

    Raises:
        TypeError: if the model has no masks.

    >>> import timm, tdm_lightning as tdm
    >>> active_parameters(tdm.attach(timm.create_model("deit_tiny_patch16_224"), tdm.SViTE()))
    4210600
    """
    inactive = sum(masks.inactive(model.vit) for masks in _required(model))
    return sum(parameter.numel() for parameter in model.vit.parameters()) - inactive


def extract_dense(model: Any) -> nn.Module:
    """The timm model without the heads and MLP units that are masked: smaller layers, the same
    outputs.

    A removed head still gives its value bias, for every token alike, because a row of attention
    sums to 1: that constant moves to ``attn.proj``'s bias. A method that stood beside ``SViTE``
    does the same on the result, because it saw the attention of the active heads only.

    Args:
        model: what :func:`~tdm_lightning.attach` made of a timm model and ``SViTE`` with
            :class:`~tdm_lightning.sparsity.Structured` masks, alone or in a stack.

    Returns:
        A new timm model; to reduce its tokens, attach a strategy to it.

    Raises:
        TypeError: if the model has no structured masks.
        ValueError: if a masked weight is not zero, so that the two would differ.

    >>> import timm, tdm_lightning as tdm
    >>> model = tdm.attach(timm.create_model("deit_tiny_patch16_224"), tdm.SViTE())
    >>> tdm.sparsity.apply_masks(model)
    >>> block = tdm.sparsity.extract_dense(model).blocks[0]
    >>> block.attn.qkv.out_features, block.mlp.fc1.out_features
    (384, 537)
    """
    parts = kept_parts(model)
    if parts is None:
        _required(model)
        raise SettingTypeError(
            "only whole heads and MLP units can be taken out, and these masks are of single weights"
        )
    if not all(masks.enforced(model.vit) for masks in sparsities(model)):
        raise SettingError(
            "the masks are not in force: some masked weights are not zero, so the model would"
            " compute something else without them. Train it, or call"
            " tdm_lightning.sparsity.apply_masks(model); for weights that were sparse when they"
            " were loaded, adopt_masks(model)"
        )
    return shrink(copy.deepcopy(model.vit), parts)


def as_extracted(model: Any) -> bool:
    """Let a reduced model run without its masked heads and MLP units, for measuring it; in place,
    and not to be trained again.

    Returns:
        Whether it has structured masks; without them nothing happens.
    """
    parts = kept_parts(model)
    if parts is not None:
        apply_masks(model)
        shrink(model.vit, parts)
    return parts is not None


def kept_parts(model: Any) -> list[Parts] | None:
    """What each block of a reduced model keeps; ``None`` without structured masks, or where all is
    done already.
    """
    for masks in sparsities(model):
        if isinstance(masks, Structured) and masks.fits(model.vit):
            found = [masks.active(index) for index in range(len(model.vit.blocks))]
            return [
                (heads.nonzero().flatten().tolist(), units.nonzero().flatten().tolist())
                for heads, units in found
            ]
    return None


@torch.no_grad()
def shrink(vit: Any, parts: Sequence[Parts]) -> Any:
    """Take heads and MLP units out of a timm model, in place; the weights of what goes are taken to
    be zero.

    Args:
        vit: a timm model with plain ``Attention`` and ``Mlp``; also on the meta device.
        parts: what each block keeps.
    """
    for block, (heads, units) in zip(vit.blocks, parts, strict=True):
        attn, mlp = block.attn, block.mlp
        device, width = attn.qkv.weight.device, attn.head_dim
        every = torch.arange(3 * attn.num_heads * width, device=device).view(
            3, attn.num_heads, width
        )
        rows, columns = every[:, heads].flatten(), every[0, heads].flatten()
        if attn.qkv.bias is not None:
            constant = attn.qkv.bias.view_as(every)[2].clone()
            constant[heads] = 0
            attn.proj.bias = _plus(attn.proj.bias, attn.proj.weight @ constant.flatten())
        attn.qkv, attn.proj = _linear(attn.qkv, rows=rows), _linear(attn.proj, columns=columns)
        attn.num_heads, attn.attn_dim = len(heads), len(columns)
        kept = torch.tensor(units, device=device)
        mlp.fc1, mlp.fc2 = _linear(mlp.fc1, rows=kept), _linear(mlp.fc2, columns=kept)
    return vit


def _plus(bias: nn.Parameter | None, constant: Tensor) -> nn.Parameter:
    if bias is None:
        return nn.Parameter(constant)
    return nn.Parameter(bias + constant, requires_grad=bias.requires_grad)


def _linear(
    layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None
) -> nn.Linear:
    """A layer with some of another's rows, that is outputs, or columns, that is inputs."""
    weight, bias = layer.weight, layer.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]  # type: ignore[assignment]
    if columns is not None:
        weight = weight[:, columns]
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    small.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        small.bias = nn.Parameter(bias.clone(), requires_grad=layer.bias.requires_grad)
    return small.train(layer.training)


def _required(model: Any) -> list[Sparsity]:
    found = sparsities(model)
    if not found:
        raise SettingTypeError(
            "this takes a model with masks, such as tdm_lightning.attach(vit, SViTE()), got a"
            f" {type(model).__name__} without"
        )
    return found
