"""The same arithmetic in Triton, and the choice between it and torch's own operations.

``tdm_lightning.kernels`` is this room: :func:`use` chooses, :func:`current` says what is chosen.

>>> with use("torch"):
...     current()
'torch'
"""

from tdm_lightning.ops.kernels.choice import Form, current, use

__all__ = ["Form", "current", "use"]
