"""Everything one forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdm_lightning.core.trace import Trace


@dataclass(frozen=True)
class Output:
    """Everything one forward pass gives.

    Attributes:
        logits: what the model's head returns, usually B×classes.
        features: B×T×C after the final norm, prefix tokens first.
        size: B×(T-prefix), patches each token stands for; ``None`` where nothing asks for it.
        state: the strategy's own state at the end of the pass, for its losses.
        trace: what became of every patch, if asked for.
    """

    logits: Tensor
    features: Tensor
    size: Tensor | None = None
    state: Any = None
    trace: Trace | None = None
