"""``tdm slim``: find the patches that each block of a trained ViT must compute."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from tdm_lightning.cli.chosen import check_trained, load_vit
from tdm_lightning.cli.progress import bars, say_where
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from tdm_lightning.slimming import Slimmed


def slim(
    weights: bool | str | None = None,
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    data: ImageNetDataModule | None = None,
    bound: float = 0.02,
    step: int = 10,
    counts: list[int] | None = None,
    match_gmacs: float | None = None,
    images: int = 256,
    epochs: int = 0,
    lr: float = 1e-4,
    device: str = "auto",
    seed: int = 0,
    out: str = "slim",
) -> Slimmed:
    """Patch Slimming's search on training images (PS-ViT, Tang et al., CVPR 2022): masks for every
    block within an error bound.

    The table is printed and saved as ``slim.csv``; weights and masks go to ``slim.safetensors``,
    which ``tdm test`` and ``tdm fit`` take with ``--config strategies/psvit --model.weights
    …/slim.safetensors``. Labels are not used.

    Args:
        weights: a checkpoint of ``tdm fit``, a folder that ``save_pretrained`` wrote or a hub
            repository, which bring along what is not given of the model (a strategy is left out);
            an official checkpoint; or ``true`` for timm's pretrained weights.
        model: the name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``.
        data: images; those of the training split are used, prepared as for evaluation.
        bound: largest relative error of each block.
        step: patches that are switched on at a time.
        counts: no search: patches that each block computes, chosen by their impact.
        match_gmacs: no search: PSViT's own schedule at so many 10⁹ multiply-accumulates per
            image, chosen by their impact.
        images: number of images to look at.
        epochs: how often to go through them to fine-tune a block that exceeds the bound, before
            more of its patches are switched on; 0: never.
        lr: learning rate of that.
        device: ``auto`` (the accelerator if there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        seed: of the choice of images.
        out: folder for the files.

    Returns:
        The slimmed model and what was found.

    Raises:
        TypeError, ValueError: without trained weights or data, if a setting is wrong or does not
            fit the model, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    from tdm_lightning.compare.environment import choose_device
    from tdm_lightning.slimming import search, select
    from tdm_lightning.slimming.table import rich_table, write_csv
    from tdm_lightning.visualize.sheet import make_folder

    if counts is not None and match_gmacs is not None:
        raise SettingError(
            "counts and match_gmacs both say how many patches each block computes; give one of them"
        )
    if data is None:
        raise SettingError(
            "a search needs images: give --data ImageNetDataModule --data.dataset NAME_OR_FOLDER"
        )
    check_trained(weights, False, "an untrained model's attention means nothing")
    compute_device = choose_device(device)
    folder = make_folder(out)
    torch.manual_seed(seed)
    data = type(data)(
        **{**data.hparams, "model": model, "model_kwargs": model_kwargs, "augment": False}
    )
    vit = load_vit(weights, model, {"num_classes": data.num_classes, **(model_kwargs or {})})
    if match_gmacs is not None:
        counts = _counts_within(vit, match_gmacs)
    data.setup("fit")
    vit = vit.to(compute_device)
    with bars() as progress:
        task = progress.add_task("blocks", total=len(vit.blocks) - 1)  # type: ignore[arg-type]

        def on_block(block: Any) -> None:
            progress.update(
                task, advance=1, description=f"block {block.index}: {block.patches} patches"
            )

        if counts is None:
            slimmed = search(
                vit, data.train_dataloader(), bound, step, images, epochs, lr, on_block
            )
        else:
            slimmed = select(vit, data.train_dataloader(), counts, images, on_block)
    save_file(slimmed.model.cpu().state_dict(), folder / "slim.safetensors")
    write_csv(slimmed, folder / "slim.csv")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(rich_table(slimmed))
    say_where(folder / name for name in ("slim.safetensors", "slim.csv"))
    return slimmed


def _counts_within(vit: nn.Module, gmacs: float) -> list[int]:
    """The counts of PSViT's own schedule within a budget."""
    from tdm_lightning.budget import at_budget
    from tdm_lightning.strategies import PSViT
    from tdm_lightning.vit import attach

    counts: Any = attach(vit, at_budget(vit, PSViT(), gmacs)).strategy.token_counts
    return list(counts)
