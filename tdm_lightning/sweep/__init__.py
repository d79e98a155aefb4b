"""Which of timm's models can be reduced: every name tried, checked and written down."""

from tdm_lightning.sweep.names import MODULES, chosen
from tdm_lightning.sweep.run import Sweep, sweep_names, try_name
from tdm_lightning.sweep.table import Row, markdown, read_rows

__all__ = ["MODULES", "Row", "Sweep", "chosen", "markdown", "read_rows", "sweep_names", "try_name"]
