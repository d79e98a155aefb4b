"""What becomes of an image's patches, drawn: panels of three schools of token reduction, and the
strategy's layers.
"""

from tdm_lightning.visualize.panels import panels, strip
from tdm_lightning.visualize.sheet import arrange, save_panels, visualize_images

__all__ = ["arrange", "panels", "save_panels", "strip", "visualize_images"]
