"""``tdm study``: what each method keeps of a plain model's accuracy at equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tdm_lightning.data import ImageNetDataModule


def study(
    part: Literal["grid", "ablation"] = "grid",
    plain: str | None = None,
    data: ImageNetDataModule | None = None,
    out: str = "study",
    methods: list[str] | None = None,
    rates: list[float] | None = None,
    seeds: list[int] | None = None,
    split: Literal["validation", "test"] | None = None,
    train_images: int = 6000,
    eval_images: int | None = None,
    lr: float = 2e-4,
    weight_decay: float = 0.05,
) -> None:
    """Run a part of the study.

    Runs are resumed where they stopped: every finished cell is a file in ``OUT/PART``, and several processes may share a folder.

    Args:
        part: ``grid``: methods at TDM's budgets, on the test split.
        plain: checkpoint that ``tdm fit`` wrote of the unreduced model.
        data: its images; the model they are prepared for is filled in.
        out: folder for results.
        methods: only these of the part's methods.
        rates: only these of TDM's keep rates.
        seeds: only these seeds.
        split: evaluate on this split; ``None``: the part's own.
        train_images: images to fine-tune on; 0: do not.
        eval_images: evaluate on the first so many images only.
        lr: learning rate of the fine-tuning.
        weight_decay: of the fine-tuning.

    Raises:
        TypeError, ValueError: if a setting is wrong, or the folder holds results made with others.
    """
    from tdm_lightning.study.finetune import Recipe
    from tdm_lightning.study.plain import Plain
    from tdm_lightning.study.plan import grid_cells
    from tdm_lightning.study.run import run_cells

    if plain is None or data is None:
        raise ValueError("give --plain FILE, a checkpoint of `tdm fit`, and --data.dataset with its images")
    start = Plain.read(plain)
    data = type(data)(**{**data.hparams, "model": start.model, "model_kwargs": start.model_kwargs})
    cells = grid_cells(methods, rates, seeds)
    recipe = Recipe(train_images, lr, weight_decay)
    run_cells(cells, start, data, Path(out) / part, recipe, split or "test", eval_images)
