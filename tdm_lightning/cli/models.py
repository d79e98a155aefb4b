"""``tdm models``: what can be reduced, and what it needs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Library:
    """Where models come from.

    Attributes:
        name: the library.
        prefix: in front of its names in commands.
        least: its oldest version that works.
        package: what pip calls it.
        extra: the extra of this library that brings it; empty: it is always there.
        how: what :func:`tdm_lightning.attach` does with its models.
    """

    name: str
    prefix: str
    least: str
    package: str
    extra: str
    how: str


LIBRARIES = (
    Library("timm", "", "1.0.31", "timm", "", "wrapped"),
    Library("torchvision", "torchvision:", "", "torchvision", "", "wrapped"),
    Library("open_clip", "open_clip:", "2.32", "open_clip_torch", "open_clip", "wrapped"),
    Library("transformers", "hf:", "5.20", "transformers", "huggingface", "in place"),
)

#: A model of each class, as commands name it without its library.
EXAMPLES = {
    "timm.models.beit.Beit": "beit_base_patch16_224",
    "timm.models.eva.Eva": "vit_small_patch16_dinov3",
    "timm.models.naflexvit.NaFlexVit": "naflexvit_base_patch16_gap",
    "timm.models.vision_transformer.VisionTransformer": "deit_small_patch16_224",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": (
        "vit_relpos_small_patch16_224"
    ),
    "torchvision.models.vision_transformer.VisionTransformer": "vit_b_16",
    "open_clip.transformer.VisionTransformer": "ViT-B-32",
    "transformers.models.beit.modeling_beit.BeitModel": "beit",
    "transformers.models.clip.modeling_clip.CLIPVisionModel": "clip",
    "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionModel": "data2vec-vision",
    "transformers.models.deit.modeling_deit.DeiTModel": "deit",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": "dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersModel": "dinov2_with_registers",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel": "dinov3_vit",
    "transformers.models.ijepa.modeling_ijepa.IJepaModel": "ijepa",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": "siglip",
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel": "siglip2",
    "transformers.models.vit.modeling_vit.ViTModel": "vit",
    "transformers.models.vit_mae.modeling_vit_mae.ViTMAEModel": "vit_mae",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel": "vit_msn",
}


def models() -> None:
    """The model classes that can be reduced, by library, with a name for the commands and what they
    need; and timm's classes that are called Vision Transformers too and cannot, with the reason.
    """
    from tdm_lightning.vit.adapters import class_names
    from tdm_lightning.vit.refusals import REFUSED

    reduced = Table("library", "class", "reduced", "--model, for example", "needs")
    for path in class_names():
        root, _, name = path.rpartition(".")
        library = library_of(path)
        if library is None:
            reduced.add_row(root, name, "", "", "")
            continue
        example = f"{library.prefix}{EXAMPLES[path]}" if path in EXAMPLES else "inside a model"
        reduced.add_row(library.name, name, library.how, example, needs(library))
    refused = Table("refused, of timm", "because")
    for name, reason in REFUSED.items():
        refused.add_row(name, reason)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(reduced)
    console.print(refused)


def library_of(path: str) -> Library | None:
    """The library of a class by its full name; ``None``: another's, which registered its own."""
    root = path.partition(".")[0]
    return next((library for library in LIBRARIES if library.name == root), None)


def needs(library: Library) -> str:
    """What must be installed for a library's models, and what is."""
    try:
        found = f"{version(library.package)} is installed"
    except PackageNotFoundError:
        found = f"pip install 'tdm-lightning[{library.extra}]'"
    least = f"≥ {library.least}, " if library.least else ""
    return least + found
