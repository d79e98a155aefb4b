"""How fast each method is at each budget, beside the plain model in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.study.plain import Plain
from benchmarks.study.plan import SEEDS, Cell, Method
from benchmarks.study.run import NoSetting, solved
from tdm_lightning.compare.environment import choose_device, environment_facts
from tdm_lightning.compare.table import Quartiles
from tdm_lightning.compare.timing import interleaved_rounds
from tdm_lightning.core.tables import append_csv, read_csv
from tdm_lightning.strategies import Strategy

#: Images in a pass, interleaved rounds that count, and rounds before them.
BATCH, ROUNDS, WARMUP = 32, 9, 2


def measure_times(
    methods: Sequence[Method],
    rates: Sequence[float],
    plain: Plain,
    path: Path,
    report: Callable[[str], None] = print,
) -> None:
    """Append to a CSV file what is not in it yet: speed as a multiple of the plain model's, ratios
    within interleaved rounds.

    Args:
        methods: the plain model is always timed beside them.
        rates: TDM's keep rates, whose budgets the methods get.
        plain: the trained model.
        path: of the file.
        report: called with a line about each method.
    """
    done = {(row["method"], float(row["rate"])) for row in read_csv(path)}
    device = choose_device("auto")
    for rate in rates:
        chosen = [m for m in methods if m.name != "Plain" and (m.name, rate) not in done]
        models: dict[str, nn.Module] = {}
        for method in chosen:
            if method.settings:
                continue  # what it costs depends on the images
            try:
                strategy, _ = solved(Cell(method, rate, SEEDS[0]), plain.vit)
            except NoSetting as error:
                report(f"{method.name} has no setting at {rate:g}: {error}")
                continue
            models[method.name] = plain.under(strategy).model.eval().to(device)
        if not models:
            continue
        unreduced = plain.under(Strategy()).model.eval().to(device)
        size = unreduced.vit.patch_embed.img_size  # type: ignore[union-attr]
        images = torch.randn(BATCH, plain.model_kwargs.get("in_chans", 3), *size, device=device)  # type: ignore[misc]
        found = list(interleaved_rounds([unreduced, *models.values()], [images], ROUNDS, WARMUP))
        for place, name in enumerate(models, start=1):
            ratio = Quartiles.of([one[0].passes[0] / one[place].passes[0] for one in found])
            rate_of = Quartiles.of([BATCH / one[place].passes[0] for one in found])
            speed = {"speedup": ratio.median, "low": ratio.q1, "high": ratio.q3}
            shown = {key: f"{value:.4f}" for key, value in speed.items()}
            shown["images_per_second"] = f"{rate_of.median:.1f}"
            facts = {"batch": BATCH, "rounds": ROUNDS, **environment_facts(device)}
            append_csv(path, {"method": name, "rate": rate, **shown, **facts})
            report(f"{name} at {rate:g}: {ratio.median:.2f} × plain")


def read_times(path: Path) -> dict[tuple[str, float], Quartiles]:
    """Speed as a multiple of the plain model's by method and keep rate; empty without the file."""
    return {
        (row["method"], float(row["rate"])): Quartiles(
            *(float(row[name]) for name in ("low", "speedup", "high"))
        )
        for row in read_csv(path)
    }
