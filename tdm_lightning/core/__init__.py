"""What everything else speaks of: tokens, what became of them, and plain-value configuration."""

from tdm_lightning.core.configurable import Configurable
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.output import Output
from tdm_lightning.core.positions import Positions
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.core.tokens import Padding, Tokens
from tdm_lightning.core.trace import History, LayerTrace, Trace

__all__ = [
    "Configurable",
    "History",
    "LayerTrace",
    "ModelInfo",
    "Output",
    "Padding",
    "Positions",
    "Reduction",
    "Role",
    "Seen",
    "Tokens",
    "Trace",
]
