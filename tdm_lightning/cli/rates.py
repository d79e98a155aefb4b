"""``tdm rates``: learn how many tokens each block should leave at a budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from tdm_lightning.cli.chosen import check_trained, load_vit
from tdm_lightning.cli.progress import bars, say_where
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers import Merger, WardMerger

if TYPE_CHECKING:
    from tdm_lightning.rates import Learned


def rates(
    match_gmacs: float | None = None,
    weights: bool | str | None = None,
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    data: ImageNetDataModule | None = None,
    merger: Merger | None = None,
    layers: list[int] | None = None,
    images: int = 512,
    sweeps: int = 2,
    device: str = "auto",
    seed: int = 0,
    out: str = "rates.yaml",
) -> Learned:
    """Learn how many tokens each block should leave at a budget, on training images without their
    labels.

    Writes a strategy that ``tdm fit``, ``tdm test`` and the others take with ``--config FILE``.

    Args:
        match_gmacs: the budget, 10⁹ multiply-accumulates per image, everything counted.
        weights: a checkpoint of ``tdm fit``, a folder that ``save_pretrained`` wrote or a hub
            repository (a strategy is left out); an official checkpoint; or ``true`` for timm's
            pretrained weights.
        model: the name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``.
        data: images; those of the training split are used, prepared as for evaluation.
        merger: what merges; ``None``: ``WardMerger()``.
        layers: the blocks that may reduce, from 0; ``None``: all.
        images: number of images to look at.
        sweeps: most times to go through the blocks.
        device: ``auto`` (the accelerator if there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        seed: of the choice of images.
        out: the file to write.

    Returns:
        What was found.

    Raises:
        TypeError, ValueError: without trained weights or data, if a setting is wrong, or the budget
            cannot be met.
    """
    from tdm_lightning.compare.environment import choose_device
    from tdm_lightning.importance import ClassAttention
    from tdm_lightning.rates import learn_counts, most_steps
    from tdm_lightning.slimming.images import take_images
    from tdm_lightning.strategies import TokenReduction
    from tdm_lightning.visualize.sheet import make_folder
    from tdm_lightning.vit.adapters import model_info

    if match_gmacs is None:
        raise SettingError("rates are learned for a budget: give --match_gmacs NUMBER")
    if data is None:
        raise SettingError(
            "learning needs images: give --data ImageNetDataModule --data.dataset NAME_OR_FOLDER"
        )
    check_trained(weights, False, "an untrained model's answers mean nothing")
    path = make_folder(Path(out).parent) / Path(out).name
    torch.manual_seed(seed)
    data = type(data)(
        **{**data.hparams, "model": model, "model_kwargs": model_kwargs, "augment": False}
    )
    vit = load_vit(weights, model, {"num_classes": data.num_classes, **(model_kwargs or {})})
    vit = vit.to(choose_device(device)).eval()
    data.setup("fit")
    batches = take_images(data.train_dataloader(), images, next(vit.parameters()))
    own = WardMerger() if merger is None else merger
    importance = ClassAttention() if "importance" in own.requires() else None

    method = TokenReduction(importance, None, own)
    least = math.inf
    with bars() as progress:
        blocks = len(layers) if layers else model_info(vit).depth
        task = progress.add_task("settings", total=most_steps(blocks, sweeps))

        def report(best: Learned) -> None:
            nonlocal least
            progress.update(task, advance=1, description=f"{best.tried} settings tried")
            if best.loss < least:
                least = best.loss
                progress.console.print(f"distortion {least:.4g}: {best.counts}", soft_wrap=True)

        found = learn_counts(vit, method, batches, match_gmacs, layers, sweeps, report)
    text = yaml.safe_dump({"model": {"strategy": found.strategy.config()}}, sort_keys=False)
    path.write_text(
        f"# {found.gmacs:.4g} GMACs; distortion {found.loss:.4g}, of a constant rate"
        f" {found.start:.4g}, on {sum(map(len, batches))} images\n{text}",
        encoding="utf-8",
    )
    print(f"tokens after each block: {found.counts}")
    print(f"distortion {found.loss:.4g}; a constant rate in these blocks: {found.start:.4g}")
    say_where([path])
    return found
