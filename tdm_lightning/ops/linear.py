"""The weights of linear layers, also where they are quantised."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def linear_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, out×in, floating point.

    Of a quantised layer it is what that layer computes with, a copy made in each pass: ``quantize_dynamic`` of
    ``torch.ao.quantization`` packs weights away behind a method, torchao makes them tensors of a class of its own.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        weight = weight()
        return weight.dequantize() if weight.is_quantized else weight
    return weight if type(weight).dequantize is Tensor.dequantize else weight.dequantize()


def linear_bias(layer: Any) -> Tensor | None:
    """The bias of a linear layer, see :func:`linear_weight`."""
    bias = layer.bias
    return bias if bias is None or isinstance(bias, Tensor) else bias()


def check_not_packed(model: nn.Module, purpose: str) -> None:
    """Whether a model's linear layers are tensors that can be traced without computing.

    Args:
        model: any.
        purpose: what was wanted, as a verb and its object.

    Raises:
        ValueError: if ``quantize_dynamic`` of ``torch.ao.quantization`` has packed them away.
    """
    packed = next((name for name, layer in model.named_modules() if hasattr(layer, "_packed_params")), None)
    if packed is not None:
        raise ValueError(
            f"cannot {purpose}: {packed!r} is quantised and its weight packed away where it can only be run; take the "
            f"model as it was before quantize_dynamic"
        )
