"""``tdm compare``: methods side by side on this machine."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from tdm_lightning.cli.progress import bars, say_where
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies import Strategy


def compare(
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    strategies: list[Strategy] | None = None,
    batch_sizes: int | list[int] = [1, 16],  # noqa: B006, never changed
    rounds: int = 9,
    warmup: int = 2,
    device: str = "auto",
    precision: str = "float32",
    match_gmacs: float | None = None,
    weights: bool | str | None = None,
    data: ImageNetDataModule | None = None,
    training: bool = False,
    runtime: str = "eager",
    limit: bool = False,
    linear_embedding: bool = False,
    seed: int = 0,
    out: str = "compare",
) -> None:
    """Parameters, GMACs, throughput, latency, launches, peak memory and, with weights and data,
    top-1 of a timm ViT under each strategy.

    The table has a row for each method and batch size. It is printed and saved as ``compare.md``,
    ``compare.csv`` and ``compare.png``; where top-1 is known, ``accuracy.png`` shows it against
    GMACs and against the images per second that were measured. On CUDA the device's own events
    tell times. Ctrl-C ends the measurement, saves what there is, and exits with code 130.

    Args:
        model: name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``, such as ``img_size``.
        strategies: the methods; ``None``: all of the poster's, and the diversity-only ones, that
            the model takes, in models of fewer blocks as far into them; with ``match_gmacs`` those
            that have a setting to solve for, with another ``runtime`` those that it takes.
        batch_sizes: images in a batch, one number or several (``--batch_sizes 1 32 256``);
            everything is measured at each of them.
        rounds: times that each method is timed, in turn with all others.
        warmup: rounds before them that are not counted.
        device: ``auto`` (the accelerator if there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        precision: ``float32``, ``bfloat16`` or ``float16``, or ``fp32``, ``bf16``, ``fp16``, of
            weights and images.
        match_gmacs: solve every method's keep rate, or ToMe's r, for this many 10⁹
            multiply-accumulates per image.
        weights: for all methods: a file, a folder or a hub name; ``None``:
            random ones, which do for speed.
        data: images for top-1, and to time on in place of random numbers, which matters for methods
            that decide image by image; the model they are prepared for is filled in.
        training: also time a training step (forward and backward), which takes about three passes
            more per round.
        runtime: ``eager``; ``compile``, with ``torch.compile``; ``graph``, CUDA graphs of the eager
            passes; or ``onnx``, exported and run in ONNX Runtime. All but the first take no methods
            that decide image by image, and tell neither memory nor own time.
        limit: add a row that no method of the same token counts can pass: those of the first
            method of a fixed budget, by ``x[:, :n]``, which costs nothing.
        linear_embedding: compute the patch embedding as reshape and linear, exactly, in all models,
            the plain one too.
        seed: of random weights, the same for all methods, and of random images.
        out: folder for the files.

    Raises:
        TypeError, ValueError: if a setting is wrong or does not fit the model, or the folder cannot
            be written; nothing is measured then.
        SystemExit: after an interrupt.
    """
    from tdm_lightning.compare import Plan, measure, prepare
    from tdm_lightning.compare.files import write
    from tdm_lightning.compare.table import rich_table
    from tdm_lightning.visualize.sheet import make_folder

    plan = Plan(
        batch_sizes,
        rounds,
        warmup,
        device,
        precision,
        seed,
        training,
        runtime,
        limit,
        linear_embedding,
    )
    if data is not None and weights is None:
        raise SettingError(
            "an untrained model's accuracy means nothing: give --weights FILE with the data"
        )
    if data is not None and data.hparams.model is None:
        data = type(data)(**{**data.hparams, "model": model, "model_kwargs": model_kwargs})
    classes = {} if data is None else {"num_classes": data.num_classes}
    with bars() as progress:
        comparison = prepare(
            model,
            strategies,
            plan,
            {**classes, **(model_kwargs or {})},
            weights,
            match_gmacs,
            progress,
            data,
        )
        folder = make_folder(out)
        measure(comparison, data, progress)
    written = write(comparison, folder)
    console = Console() if sys.stdout.isatty() else Console(width=240)
    for name, value in comparison.facts.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    console.print(rich_table(comparison.rows()))
    for remark in comparison.remarks():
        console.print(remark, markup=False, highlight=False)
    say_where(written)
    if comparison.interrupted:
        raise SystemExit(130)  # as a shell reports a program that Ctrl-C ended
