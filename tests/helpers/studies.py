"""A small study: digits, and a model of ten narrow blocks."""

import json

from benchmarks.study.plan import METHODS
from tdm_lightning.data import ImageNetDataModule

NAME = "deit_tiny_patch16_224"
SHAPE = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "depth": 10,
}
DATA = {
    "dataset": "digits",
    "batch_size": 8,
    "eval_batch_size": 20,
    "num_workers": 0,
    "auto_augment": None,
    "re_prob": 0.0,
}
METHODS_BY_NAME = {method.name: method for method in METHODS}
SMALL = [
    "--methods=[TDM,EViT]",
    "--rates=[0.7,0.3]",
    "--seeds=[1]",
    "--train-images=16",
    "--eval-images=40",
]


def cells_in(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def data():
    module = ImageNetDataModule(**DATA, model=NAME, model_kwargs=SHAPE)
    module.setup("fit")
    module.setup("test")
    return module
