"""How long a forward pass takes, measured in interleaved rounds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from tdm_lightning.compare.runtime import Run
from tdm_lightning.vit import TokenReducedViT

#: A pass that is shorter than this is repeated until this many seconds are filled, and counts as
#: their mean.
LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Sample:
    """One method in one round.

    Attributes:
        batch: seconds for a pass of the whole batch.
        single: seconds for a pass of its first image alone.
        step: seconds for a forward and backward pass of the batch in training mode; NaN where that
            is not asked for.
    """

    batch: float
    single: float
    step: float = math.nan


#: One sample of each method, in the methods' order.
Round = list[Sample]


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def seconds(model: Run, images: Tensor, passes: int = 1) -> float:
    """Mean time of a forward pass, the device's work included."""
    wait_for(images.device)
    start = perf_counter()
    for _ in range(passes):
        model(images)
    wait_for(images.device)
    return (perf_counter() - start) / passes


def step_seconds(model: nn.Module, images: Tensor) -> float:
    """Time of one forward and backward pass in training mode, without optimizer, teacher or the
    strategy's own losses.
    """
    model.train()
    wait_for(images.device)
    start = perf_counter()
    model(images).square().mean().backward()
    wait_for(images.device)
    elapsed = perf_counter() - start
    model.zero_grad(set_to_none=True)
    model.eval()
    return elapsed


#: Stages of a pass in which the strategy works and the timm model does not.
_OWN = ("begin", "before_block", "after_attention", "after_block", "finish")


@torch.inference_mode()
def own_share(model: nn.Module, images: Tensor, passes: int) -> float:
    """Median share of a forward pass that is spent in the strategy's hooks and observing attention;
    NaN for a plain model.
    """
    if not isinstance(model, TokenReducedViT):
        return math.nan
    shares = []
    for _ in range(passes):
        times: dict[str, float] = defaultdict(float)
        wait_for(images.device)
        last = perf_counter()

        def watch(stage: str, index: int, times: dict[str, float] = times) -> None:
            nonlocal last
            wait_for(images.device)
            now = perf_counter()
            times[stage] += now - last
            last = now

        model.run(images, watch=watch)
        shares.append(sum(times[stage] for stage in _OWN) / sum(times.values()))
    return median(shares)


def interleaved_rounds(
    models: Sequence[Run],
    images: Tensor,
    rounds: int,
    warmup: int,
    advance: Callable[[], None] = lambda: None,
    training: bool = False,
) -> Iterator[Round]:
    """Time all models in each round, so that whatever slows the machine for a while slows them
    alike.

    Every other round runs in the opposite order: no model always follows the same one.

    Args:
        models: forward passes, of models ready for evaluation on the images' device; with
            ``training`` the models themselves.
        images: the batch, B×C×H×W.
        rounds: how many to time.
        warmup: rounds before them, which are not counted but tell how often short passes must be
            repeated.
        advance: called after each model.
        training: time a training step too, whose gradients are thrown away.

    Yields:
        One complete round at a time.
    """
    inputs = (images, images[:1])
    passes = [[1, 1] for _ in models]
    for number in range(warmup + rounds):
        order = range(len(models)) if number % 2 == 0 else range(len(models) - 1, -1, -1)
        found: dict[int, Sample] = {}
        for index in order:
            batch, single = (
                seconds(models[index], x, n) for x, n in zip(inputs, passes[index], strict=True)
            )
            step = step_seconds(models[index], images) if training else math.nan  # type: ignore[arg-type]
            found[index] = Sample(batch, single, step)
            if (
                number < warmup
            ):  # the last warm-up round decides: the first one also loads and tunes kernels
                passes[index] = [
                    max(1, math.ceil(LEAST_SECONDS / time)) for time in (batch, single)
                ]
            advance()
        if number >= warmup:
            yield [found[index] for index in range(len(models))]
