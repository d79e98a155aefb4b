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
    crops: int = 96,
    draws: list[int] | None = None,
    out: str = "fidelity",
) -> list[Path]:
    """Compare the features of a reduced ViT with its own unreduced, on crops of photographs,
    without labels.

    The methods are those that need no training, each at the GMACs of TDM's keep rates. The
    photographs come with scikit-learn and scikit-image. It goes on where it stopped: every line of
    ``fidelity.csv`` is one method at one budget on one draw. Writes ``fidelity.md`` and
    ``fidelity.png`` from it, and ``panels.png`` with what the patches of each photograph become
    under WardTDM at 0.5.

    Args:
        model: name of a timm ViT.
        model_kwargs: passed to ``timm.create_model``, such as ``img_size``.
        weights: a file, a folder or a hub name, or ``true`` for timm's pretrained ones.
        methods: only these methods.
        rates: only these of TDM's keep rates.
        crops: of a draw.
        draws: seeds of the draws.
        out: folder for the files.

    Returns:
        The files written.

    Raises:
        ValueError: without trained weights, or for a setting that does not fit.
    """
    import torch

    from benchmarks.fidelity import table
    from benchmarks.fidelity.photographs import crops as crops_of
    from benchmarks.fidelity.photographs import photographs
    from benchmarks.fidelity.run import DRAWS, RATES, measured, training_free
    from tdm_lightning.checkpoints import load_weights
    from tdm_lightning.strategies import WardTDM
    from tdm_lightning.visualize.images import data_config
    from tdm_lightning.visualize.plots import save
    from tdm_lightning.visualize.sheet import make_folder, save_schools
    from tdm_lightning.vit import attach
    from tdm_lightning.vit.create import create_vit

    if not weights:
        raise SettingError(
            "an untrained model's features mean nothing: give --weights FILE, or true for timm's"
            " pretrained ones"
        )
    arguments = model_kwargs or {}
    vit = create_vit(model, weights is True, **arguments).eval()
    if isinstance(weights, str):
        load_weights(vit, weights)
    photos, folder = photographs(), make_folder(out)
    path = folder / "fidelity.csv"
    for one in measured(
        vit,
        lambda: create_vit(model, **arguments),
        lambda draw: crops_of(photos, crops, draw, data_config(vit)),
        training_free(methods),
        RATES if rates is None else rates,
        DRAWS if draws is None else draws,
        {(one.method, one.rate, one.draw) for one in table.read(path)},
    ):
        table.add(path, one)
        mean, error = table.mean_and_error([100 * value for value in one.pooled])
        print(f"draw {one.draw}, {one.rate:g}, {one.method}: {mean:.2f} ± {error:.2f}", flush=True)
    every = table.read(path)
    written = [path, folder / "fidelity.md", save(table.figure(every), folder / "fidelity.png")]
    written[1].write_text(table.text(every), encoding="utf-8")
    with torch.inference_mode():
        model_at_half = attach(vit, WardTDM(0.5)).eval()
        written.append(save_schools(folder / "panels.png", list(photos.values()), model_at_half))
    for file in written:
        print(file)
    return written


if __name__ == "__main__":
    run(fidelity)
