"""``python -m benchmarks.study``: what each method keeps of a plain model's accuracy at equal
cost.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.runner import run
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.sheet import make_folder

#: What each part that runs models evaluates on: whatever is chosen is chosen on the validation
#: split.
_SPLITS: dict[str, Literal["validation", "test"]] = {
    "grid": "test",
    "ablation": "validation",
    "placement": "validation",
    "ward": "validation",
}


def study(
    part: Literal["grid", "ablation", "placement", "ward", "times", "report"] = "report",
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
    distill: float = 0.0,
) -> list[Path]:
    """Run a part of the study, or draw what it found.

    It goes on where it stopped: every finished cell is a file in ``OUT/PART``. Several processes
    may share a folder.

    Args:
        part: ``grid``: methods at TDM's budgets, on the test split. ``ablation``: TDM with one of
            its merger's arguments changed at a time, on the validation split. ``placement``: TDM in
            other blocks, on that split too. ``ward``: WardTDM with one part changed at a time, on
            that split too. ``times``: how fast the methods are at those budgets, without
            training. ``report``: tables and figures of what is there, in seconds.
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
        distill: weight of distillation from the plain model in the fine-tuning; 0: none.

    Returns:
        The files that the report wrote.

    Raises:
        TypeError, ValueError: if a setting is wrong, or the folder holds results made with others.
    """
    from benchmarks.study import ward
    from benchmarks.study.ablate import ablation_cells
    from benchmarks.study.finetune import Recipe
    from benchmarks.study.placement import placement_cells
    from benchmarks.study.plain import Plain
    from benchmarks.study.plan import METHODS, RATES, chosen_methods, crossed, grid_cells
    from benchmarks.study.report import report
    from benchmarks.study.run import run_cells
    from benchmarks.study.times import measure_times

    folder = Path(out)
    if part == "report":
        written = report(folder)
        for path in written:
            print(path)
        return written
    if plain is None or data is None:
        raise SettingError(
            "give --plain FILE, a checkpoint of `tdm fit`, and --data with its images"
        )
    logging.getLogger("lightning.pytorch").setLevel(
        logging.WARNING
    )  # it introduces itself once per cell
    start = Plain.read(plain)
    if part == "times":
        path = make_folder(folder) / "times.csv"
        measure_times(chosen_methods(METHODS, methods), rates or RATES, start, path)
        return [path]
    data = type(data)(**{**data.hparams, "model": start.model, "model_kwargs": start.model_kwargs})
    made = {
        "grid": partial(grid_cells, trained=train_images > 0),
        "ablation": ablation_cells,
        "placement": placement_cells,
        "ward": partial(crossed, ward.VARIANTS, ward.RATES),
    }
    cells = made[part](methods, rates, seeds)
    recipe = Recipe(train_images, lr, weight_decay, distill)
    run_cells(cells, start, data, folder / part, recipe, split or _SPLITS[part], eval_images)
    return []


if __name__ == "__main__":
    run(study)
