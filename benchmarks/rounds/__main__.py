"""``python -m benchmarks.rounds``: what a photograph's patches become, round by round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.runner import run
from tdm_lightning.errors import SettingError


def rounds(
    model: str = "vit_small_patch14_dinov2",
    model_kwargs: dict[str, Any] | None = None,
    weights: bool | str | None = None,
    photographs: list[str] | None = None,
    block: int = 0,
    keep_rate: float = 0.35,
    count: int = 4,
    protect: float = 0.0,
    out: str = "rounds.png",
) -> Path:
    """Draw the groups after each of ``WardMerger``'s rounds in one block.

    Args:
        model: name of a timm ViT.
        model_kwargs: passed to ``timm.create_model``, such as ``img_size``.
        weights: a file, a folder or a hub name, or ``true`` for timm's pretrained ones.
        photographs: names of those to draw, of scikit-learn's and scikit-image's.
        block: the reducing block, from 0.
        keep_rate: share of the patches that leaves it.
        count: how many rounds.
        protect: share of the patches that takes no part.
        out: the PNG to write.

    Returns:
        The file.

    Raises:
        ValueError: without trained weights, or for a setting that does not fit.
    """
    from benchmarks.fidelity.photographs import photographs as all_photographs
    from tdm_lightning.checkpoints import load_weights
    from tdm_lightning.importance import ClassAttention
    from tdm_lightning.mergers import WardMerger
    from tdm_lightning.ops.ward import pairs_per_round
    from tdm_lightning.schedules import CountPerBlock
    from tdm_lightning.strategies import TokenReduction
    from tdm_lightning.visualize.panels import panels
    from tdm_lightning.visualize.sheet import save_panels
    from tdm_lightning.vit import attach
    from tdm_lightning.vit.adapters import model_info
    from tdm_lightning.vit.create import create_vit

    if not weights:
        raise SettingError("an untrained model's features mean nothing: give --weights FILE")
    vit = create_vit(model, weights is True, **(model_kwargs or {})).eval()
    if isinstance(weights, str):
        load_weights(vit, weights)
    info = model_info(vit)
    protected = WardMerger(count, protect).protected(info.patches)
    part, keep = info.patches - protected, math.ceil(keep_rate * info.patches)
    pairs = pairs_per_round(part, keep - protected, count)
    rows = []
    for name in photographs or ["flower", "astronaut"]:
        picture = all_photographs()[name]
        drawn = {}
        for done in range(1, count + 1):
            left = info.patches - sum(pairs[:done])
            counts = [info.patches] * block + [left] * (info.depth - block)
            merger = WardMerger(done, protect)
            strategy = TokenReduction(ClassAttention(), CountPerBlock(counts), merger)
            found = panels(attach(vit, strategy), picture)
            drawn["original"] = found["original"]
            drawn[f"round {done}: {left} tokens"] = found["reduced"]
        rows.append(drawn)
    path = save_panels(out, rows, side=224, colours=256)
    print(path)
    return path


if __name__ == "__main__":
    run(rounds)
