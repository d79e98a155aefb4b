"""What the kernels take; known where Triton is not installed too."""

from __future__ import annotations

#: The most tokens of an image that the plans take: 37×37 patches, 518² pixels in patches of 14.
MOST = 1369


def too_many(tokens: int) -> str | None:
    """Why a plan does not take so many tokens; ``None``: it does.

    >>> too_many(1370)
    'the kernel takes at most 1369 tokens, got 1370'
    """
    return f"the kernel takes at most {MOST} tokens, got {tokens}" if tokens > MOST else None
