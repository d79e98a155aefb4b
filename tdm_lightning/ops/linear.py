"""The weights of linear layers, also where they are quantised."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdm_lightning.errors import SettingError


def linear_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, out×in, floating point.

    Of a quantised layer it is what that layer computes with, a copy made in each pass:
    ``quantize_dynamic`` of ``torch.ao.quantization`` packs weights away behind a method, torchao
    makes them tensors of a class of its own.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        weight = weight()
        return weight.dequantize() if weight.is_quantized else weight
    return weight.dequantize() if is_quantized(layer) else weight


def is_quantized(layer: Any) -> bool:
    """Whether a linear layer's weight can be run but is no plain tensor to compute with, see
    :func:`linear_weight`.
    """
    weight = layer.weight
    return not isinstance(weight, Tensor) or type(weight).dequantize is not Tensor.dequantize


def is_plain(layer: Any) -> bool:
    """Whether a layer is torch's own linear one, with whole weights and nothing hooked to it, so
    that computing with a part of its weight is as good as calling it.
    """
    plain = type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor)
    return plain and not (layer._forward_hooks or layer._forward_pre_hooks)


def linear_bias(layer: Any) -> Tensor | None:
    """The bias of a linear layer, see :func:`linear_weight`."""
    bias = layer.bias
    return bias if bias is None or isinstance(bias, Tensor) else bias()


def check_not_quantized(model: nn.Module, purpose: str, packed: bool = False) -> None:
    """Whether a model's linear layers hold plain tensors.

    Args:
        model: any.
        purpose: what was wanted, as a verb and its object.
        packed: refuse only what ``torch.ao.quantization`` packed away: ``torch.export`` takes
            torchao's tensors.

    Raises:
        ValueError: if a linear layer is quantised.
    """
    for name, layer in model.named_modules():
        if (
            hasattr(layer, "in_features")
            and is_quantized(layer)
            and not (packed and isinstance(layer.weight, Tensor))
        ):
            raise SettingError(
                f"cannot {purpose}: {name!r} is quantised, so its weight can be run but not"
                " computed with; take the model as it was before it was quantised"
            )
