"""The pictures of docs/methods/: one photograph under each method, as the tokens are after some of
its reducing blocks.

    python docs/pictures.py true             # timm's pretrained DINOv2-small
    python docs/pictures.py WEIGHTS TDM EViT  # a file of weights; these methods only

What a method has to learn (DynamicViT's predictors, say) is untrained, whatever the weights are.
"""

import sys
from pathlib import Path

import timm
import torch
from PIL import Image

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_weights
from tdm_lightning.visualize import panels, save_panels

FOLDER = Path(__file__).parent / "methods"
MODEL = "vit_small_patch14_dinov2"  # at 224² pixels: 16×16 patches

#: What is drawn, by the name of the page. Thresholds are such that something happens.
METHODS = {
    "tdm": tdm.TDM(0.7),
    "wardtdm": tdm.WardTDM(0.7),
    "evit": tdm.EViT(0.7),
    "topk": tdm.TopK(0.7),
    "random": tdm.Random(0.7),
    "tome": tdm.ToMe(r=16),
    "pitome": tdm.PiToMe(0.9),
    "mctf": tdm.MCTF(r=16),
    "diffrate": tdm.DiffRate("deit_small-2.9"),
    "tofu": tdm.ToFu(r=16),
    "mpm": tdm.MPM(),
    "mame": tdm.MaMe(),
    "dpcknn": tdm.DPCKNN(0.7),
    "dyvit": tdm.DyViT(0.7),
    "spvit": tdm.SPViT(fixed_count=True),
    "evovit": tdm.EvoViT(0.5),
    "psvit": tdm.PSViT(0.91),
}


def photograph() -> Image.Image:
    """scikit-image's astronaut: a face, and a background that is not empty."""
    from skimage import data

    return Image.fromarray(data.astronaut())


def model_for(name: str, weights: str | None) -> tdm.TokenReducedViT:
    """DINOv2-small under a method. ``weights``: a file, ``"true"`` for timm's, ``None``: random."""
    torch.manual_seed(0)
    pool = {"global_pool": "avg", "fc_norm": False} if name == "evovit" else {}
    vit = timm.create_model(MODEL, pretrained=weights == "true", img_size=224, **pool)
    if weights not in ("true", None):
        load_weights(vit, weights)
    return tdm.attach(vit.eval(), METHODS[name])


def draw(name: str, weights: str | None, folder: Path = FOLDER, side: int = 176) -> Path:
    """Write one method's picture: the photograph, and up to four of its reducing blocks."""
    drawn = panels(model_for(name, weights), photograph())
    blocks = [title for title in drawn if title.startswith("block ")]
    chosen = [blocks[round(i * (len(blocks) - 1) / 3)] for i in range(4)]
    row = {title: drawn[title] for title in ("original", *dict.fromkeys(chosen))}
    return save_panels(folder / f"{name}.png", [row], side, colours=64)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("an untrained model's attention means nothing: python docs/pictures.py WEIGHTS")
    for name in [given.lower() for given in sys.argv[2:]] or METHODS:
        print(draw(name, sys.argv[1]))
