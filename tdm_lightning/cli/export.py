"""``tdm export``: write a reduced model for other programs and people."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tdm_lightning.cli.chosen import Chosen, check_trained, choose_model
from tdm_lightning.cli.progress import bars
from tdm_lightning.strategies import Strategy

_ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2", "hub": ""}
_RUNTIMES = {"onnx": "ONNX Runtime", "pt2": "torch", "aoti": "AOTInductor"}


def export(
    weights: bool | str | None = None,
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    strategy: Strategy | list[Strategy] | None = None,
    random_weights: bool = False,
    format: Literal["onnx", "pt2", "aoti", "hub"] = "onnx",
    images: list[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
    out: str | None = None,
) -> Path:
    """Write a model with its strategy as an ONNX file, a program of ``torch.export``, the same
    compiled, or a folder for the Hugging Face hub.

    A file takes batches of any size, of images of one size. It is run on several batches and must
    give the model's logits to 1e-4, or it is not kept. Images in which rounding decides between
    tokens are left out of that and counted.

    Args:
        weights: a checkpoint of ``tdm fit``, a folder that ``save_pretrained`` or ``tdm export
            --format hub`` wrote or a hub repository, which bring along what is not given of model
            and strategy; an official checkpoint; or ``true`` for timm's pretrained weights.
        model: the name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``.
        strategy: the token-reduction method; ``None``: that of the weights, or TDM at 0.7.
        random_weights: export an untrained model all the same, to measure its speed.
        format: ``onnx``; ``pt2`` for torch alone; ``aoti`` for the same torch, compiled for the CPU
            of this machine by AOTInductor, which needs a C++ compiler; ``hub`` for other users of
            this library and of timm.
        images: image files to compare on too.
        input_size: channels, height and width of the images that a file takes; ``None``: the
            model's own.
        out: the file, or the folder of ``hub``; ``None``: ``model.onnx``, ``model.pt2`` or
            ``model``.

    Returns:
        What was written.

    Raises:
        TypeError, ValueError: without trained weights, for an adaptive strategy, if a setting is
            wrong or the check fails.
    """
    from tdm_lightning.export import export_compiled, export_onnx, export_program

    check_trained(weights, random_weights, "an untrained model is of no use to others")
    chosen = choose_model(weights, model, model_kwargs, strategy)
    path = Path(out or f"model{_ENDINGS[format]}")
    if format == "hub":
        return _share(chosen, path)
    logging.getLogger("onnxscript").setLevel(
        logging.ERROR
    )  # a line for each step that it cannot simplify
    write = {"onnx": export_onnx, "pt2": export_program, "aoti": export_compiled}[format]
    batch = _opened(chosen.model, images, input_size)
    with bars() as progress:
        written = write(chosen.model, path, batch, input_size, progress)
    difference, count, ties = written.agreement
    print(
        f"{path}: {written.size / 1e6:.1f} MB; in {_RUNTIMES[format]} logits differ by at most"
        f" {difference:.1e} on {count} images"
    )
    if ties:
        print(f"{ties} images left out of that: rounding decides between their tokens")
    for kind, shapes in (("input", written.inputs), ("output", written.outputs)):
        for name, shape in shapes.items():
            print(f"{kind} {name}: {'×'.join(map(str, shape))}, float32")
    return path


def _share(chosen: Chosen, folder: Path) -> Path:
    chosen.model.save_pretrained(folder, config=chosen.config)
    print(
        f"{folder}: load it with TokenReducedViT.from_pretrained(), upload it with `hf upload"
        f" USER/NAME {folder}`"
    )
    return folder


def _opened(
    model: nn.Module, paths: list[str] | None, size: tuple[int, int, int] | None
) -> Tensor | None:
    if not paths:
        return None
    from tdm_lightning.visualize.images import data_config, open_image, prepare

    config = data_config(model, None if size is None else size[1:])
    return torch.stack([prepare(open_image(path), config)[0] for path in paths])
