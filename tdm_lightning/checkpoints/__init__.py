"""Load the weight files that the authors of DeiT and of the token-reduction systems published."""

from tdm_lightning.checkpoints.files import read_file
from tdm_lightning.checkpoints.layouts import LAYOUTS, Layout
from tdm_lightning.checkpoints.load import LoadReport, load_official

__all__ = ["LAYOUTS", "Layout", "LoadReport", "load_official", "read_file"]
