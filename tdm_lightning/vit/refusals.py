"""Why models that are called Vision Transformers too cannot be reduced."""

from __future__ import annotations

from torch import nn

_GRID = "its stages pool or convolve the map of patches, which must keep its shape"
_WINDOWS = "its attention runs in windows, which need every patch in its place"

#: timm's classes whose names users try, and the reason for each.
REFUSED = {
    "Cait": "its attention mixes the heads' logits before the softmax, and the class token joins in"
    " the last two blocks alone, so nothing tells which patches matter",
    "CoaT": _GRID,
    "ConVit": "its attention is gated with one by positions, over the whole grid",
    "CrossVit": "its two branches hold patches of two sizes and exchange class tokens",
    "DaVit": _WINDOWS,
    "GlobalContextVit": _WINDOWS,
    "Hiera": "its stages pool queries within units of patches, which must be whole",
    "LevitDistilled": _GRID,
    "MaxxVit": _WINDOWS,
    "MultiScaleVit": _GRID,
    "PoolingVisionTransformer": _GRID,
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "TNT": "every patch has tokens of its pixels beside it",
    "Twins": _WINDOWS,
    "VOLO": _GRID,
    "VisionTransformerSAM": "most of its blocks attend in windows of the map of patches",
    "Xcit": "its attention is among channels, and each block convolves the map of patches",
}


def why_refused(vit: nn.Module) -> str | None:
    """The reason for a model; ``None``: no more is known than that there is no adapter."""
    for kind in type(vit).__mro__:
        if kind.__module__.startswith("timm.") and kind.__name__ in REFUSED:
            return REFUSED[kind.__name__]
    if any("Window" in type(module).__name__ for module in vit.modules()):
        return _WINDOWS
    if not hasattr(vit, "blocks"):
        return (
            "it has no sequence of transformer blocks (`blocks`); only Vision Transformers hold"
            " tokens to reduce"
        )
    return None
