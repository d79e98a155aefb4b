"""What becomes of an image's patches, drawn: panels of three schools of token reduction, and the
strategy's layers; animations, contact sheets over methods, and pages to point at.
"""

from tdm_lightning.visualize.files import visualize_images, visualize_methods
from tdm_lightning.visualize.frames import animation, contact_sheet, save_animation
from tdm_lightning.visualize.page import page, save_page
from tdm_lightning.visualize.panels import panels, strip
from tdm_lightning.visualize.sheet import arrange, save_panels
from tdm_lightning.visualize.story import Story, tell

__all__ = [
    "Story",
    "animation",
    "arrange",
    "contact_sheet",
    "page",
    "panels",
    "save_animation",
    "save_page",
    "save_panels",
    "strip",
    "tell",
    "visualize_images",
    "visualize_methods",
]
