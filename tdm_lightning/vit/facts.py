"""What a strategy must know about a timm ViT."""

from __future__ import annotations

from typing import Any


def class_rows(vit: Any) -> int:
    """Number of leading tokens whose attention measures importance.

    The class token, and the distillation token of distilled models, because both feed the classifier; register tokens do not.
    0 for a model without a class token.
    """
    if getattr(vit, "cls_token", None) is None:
        return 0
    return 2 if getattr(vit, "dist_token", None) is not None else 1
