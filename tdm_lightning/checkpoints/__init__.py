"""Load weights: what authors published, what ``tdm fit`` wrote, folders and hub repositories."""

from tdm_lightning.checkpoints.files import read_file
from tdm_lightning.checkpoints.layouts import LAYOUTS, Layout
from tdm_lightning.checkpoints.load import LoadReport, load_official
from tdm_lightning.checkpoints.weights import Source, Stored, load_weights, open_weights

__all__ = [
    "LAYOUTS",
    "Layout",
    "LoadReport",
    "Source",
    "Stored",
    "load_official",
    "load_weights",
    "open_weights",
    "read_file",
]
