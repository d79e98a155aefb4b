"""``python -m benchmarks.fidelity``: how far methods move what a pretrained ViT makes of
photographs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.runner import run
from tdm_lightning.errors import SettingError


def fidelity(
    model: str = "vit_small_patch14_dinov2",
    model_kwargs: dict[str, Any] | None = None,
    weights: bool | str | None = None,
    methods: list[str] | None = None,
    rates: list[float] | None = None,
    out: str = "study",
) -> list[Path]:
    """Compare patch features and attention of a reduced ViT with its own unreduced, on photographs,
    without labels.

    The methods are those that need no training, each at the GMACs of TDM's keep rates. The
    photographs come with scikit-learn and scikit-image. Writes ``fidelity.csv`` and
    ``fidelity.png``, which ``python -m benchmarks.study`` redraws, and ``panels.png`` with what the
    patches of each photograph become under TDM at 0.7.

    Args:
        model: name of a timm ViT.
        model_kwargs: passed to ``timm.create_model``, such as ``img_size``.
        weights: a file, a folder or a hub name, or ``true`` for timm's pretrained ones.
        methods: only these methods.
        rates: only these of TDM's keep rates.
        out: folder for the files.

    Returns:
        The files written.

    Raises:
        ValueError: without trained weights, or for a setting that does not fit.
    """
    import torch
    from timm.data import create_transform

    from benchmarks.study import figures
    from benchmarks.study.fidelity import measure_fidelity
    from benchmarks.study.photographs import photographs
    from benchmarks.study.results import write_fidelity
    from tdm_lightning.checkpoints import load_weights
    from tdm_lightning.strategies import TDM
    from tdm_lightning.visualize.images import data_config
    from tdm_lightning.visualize.sheet import make_folder, save_schools
    from tdm_lightning.vit import attach
    from tdm_lightning.vit.create import create_vit

    if not weights:
        raise SettingError(
            "an untrained model's features mean nothing: give --weights FILE, or true for timm's"
            " pretrained ones"
        )
    arguments = model_kwargs or {}
    vit = create_vit(model, pretrained=weights is True, **arguments).eval()
    if isinstance(weights, str):
        load_weights(vit, weights)
    photos = photographs()
    found = measure_fidelity(
        vit,
        lambda strategy: create_vit(model, **arguments),
        photos,
        create_transform(**data_config(vit)),
        methods,
        rates,
    )
    folder = make_folder(out)
    written = [
        write_fidelity(folder, found),
        figures.save(figures.fidelity(found), folder / "fidelity.png"),
    ]
    with torch.inference_mode():
        written.append(
            save_schools(folder / "panels.png", list(photos.values()), attach(vit, TDM(0.7)).eval())
        )
    for path in written:
        print(path)
    return written


if __name__ == "__main__":
    run(fidelity)
