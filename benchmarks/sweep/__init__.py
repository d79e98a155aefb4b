"""Which of timm's models can be reduced: every name tried, checked and written down."""

from benchmarks.sweep.names import MODULES, chosen
from benchmarks.sweep.run import Sweep, sweep_names, try_name
from benchmarks.sweep.table import Row, markdown, read_rows

__all__ = ["MODULES", "Row", "Sweep", "chosen", "markdown", "read_rows", "sweep_names", "try_name"]
