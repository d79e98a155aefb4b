"""Where should a merged token stand? Two rules, for models whose blocks ask for positions.

Reports accuracy on held-out images, without fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tdm_lightning as tdm
from benchmarks.runner import run
from benchmarks.study.evaluate import gathered
from benchmarks.study.plain import Plain
from tdm_lightning.core import Tokens
from tdm_lightning.core.tables import append_csv
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.sheet import make_folder
from tdm_lightning.vit.adapters import model_info

reduced = Tokens.reduced


def at_most_important(tokens: Tokens, *reduction: Any) -> Tokens:
    """What the library does under rotary positions."""
    return reduced(_with_columns(tokens, None), *reduction)


def at_mean(tokens: Tokens, *reduction: Any) -> Tokens:
    """What it does under a relative position bias."""
    return reduced(_with_columns(tokens, 7), *reduction)


def _with_columns(tokens: Tokens, columns: int | None) -> Tokens:
    assert tokens.positions is not None
    size = torch.ones_like(tokens.patches[..., 0]) if tokens.size is None else tokens.size
    return tokens.replace(positions=replace(tokens.positions, columns=columns), size=size)


RULES = {"most important": at_most_important, "mean": at_mean}
STRATEGIES = {
    "TDM 0.7": lambda: tdm.TDM(0.7),
    "TDM 0.5": lambda: tdm.TDM(0.5),
    "TDM 0.3": lambda: tdm.TDM(0.3),
    "DPCKNN 0.5": lambda: tdm.DPCKNN(0.5),
    "ToMe r=3": lambda: tdm.ToMe(3),
}


@torch.inference_mode()
def right(model: tdm.TokenReducedViT, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a model gets right, bool."""
    return torch.cat([model(batch) for batch in images.split(250)]).argmax(dim=1) == labels


def positions(
    checkpoints: list[str],
    dataset: str = "zalando-datasets/fashion_mnist",
    images: int | None = None,
    out: str = "positions",
) -> Path:
    """Compare where merged tokens stand: at their most important member, or in their middle.

    Args:
        checkpoints: of ``tdm fit``, of plain models.
        dataset: a folder or hub name; a tenth of its training images is held out and evaluated on.
        images: only so many of them.
        out: folder for ``results.csv``.

    Returns:
        The file written.

    Raises:
        ValueError: for a model whose blocks ask for no positions.
    """
    starts = [Plain.read(checkpoint) for checkpoint in checkpoints]
    for start in starts:
        if not model_info(start.under(tdm.Strategy()).model.vit).relative_positions:
            raise SettingError(
                f"the blocks of {start.model} ask for no positions, so nothing depends on where a"
                " token stands; take a model with rotary positions or a relative position bias"
            )
    path = make_folder(out) / "results.csv"
    path.unlink(missing_ok=True)
    for start in starts:
        for row in _rows(start, dataset, images):
            append_csv(path, row)
            print(*row.values(), sep=",", flush=True)
    return path


def _rows(start: Plain, dataset: str, most: int | None) -> Iterator[dict[str, Any]]:
    data = tdm.ImageNetDataModule(
        dataset,
        val_split=None,
        val_holdout=0.1,
        model=start.model,
        model_kwargs=start.model_kwargs,
        crop_pct=1.0,
        num_workers=0,
    )
    data.setup("validate")
    images, labels = (part[:most] for part in gathered(data.val_dataloader()))
    for name, strategy in {"plain": tdm.Strategy, **STRATEGIES}.items():
        model = start.under(strategy()).model.eval()
        found = {}
        for rule, chosen in RULES.items():
            Tokens.reduced = chosen  # type: ignore[method-assign]
            found[rule] = right(model, images, labels)
        Tokens.reduced = reduced  # type: ignore[method-assign]
        for rule, other in zip(RULES, reversed(RULES), strict=True):
            only = int((found[rule] & ~found[other]).sum())
            accuracy = f"{found[rule].double().mean():.4f}"
            yield {
                "model": start.model,
                "strategy": name,
                "rule": rule,
                "accuracy": accuracy,
                "only this rule right": only,
                "images": len(labels),
            }


if __name__ == "__main__":
    run(positions)
