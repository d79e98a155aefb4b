"""How long a forward pass takes, measured in interleaved rounds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

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
        passes: seconds for a forward pass of each batch.
        steps: seconds for a forward and backward pass of each batch in training mode; empty where
            that is not asked for.
    """

    passes: tuple[float, ...]
    steps: tuple[float, ...] = ()


#: One sample of each method, in the methods' order.
Round = list[Sample]


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def elapsed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds from the first to the last thing that the device does for some work: by its own
    events on CUDA, elsewhere by the clock.
    """
    wait_for(device)
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = perf_counter()
    work()
    wait_for(device)
    return perf_counter() - begun


@torch.inference_mode()
def seconds(model: Run, images: Tensor, passes: int = 1) -> float:
    """Mean time of a forward pass, the device's work included."""

    def work() -> None:
        for _ in range(passes):
            model(images)

    return elapsed(work, images.device) / passes


def step_seconds(model: nn.Module, images: Tensor) -> float:
    """Time of one forward and backward pass in training mode, without optimizer, teacher or the
    strategy's own losses.
    """
    model.train()
    time = elapsed(lambda: model(images).square().mean().backward(), images.device)
    model.zero_grad(set_to_none=True)
    model.eval()
    return time


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
    batches: Sequence[Tensor],
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
        batches: images, each B×C×H×W, of all sizes to time.
        rounds: how many to time.
        warmup: rounds before them, which are not counted but tell how often short passes must be
            repeated.
        advance: called after each model.
        training: time training steps too, whose gradients are thrown away.

    Yields:
        One complete round at a time.
    """
    repeats = [[1] * len(batches) for _ in models]
    for number in range(warmup + rounds):
        order = range(len(models)) if number % 2 == 0 else range(len(models) - 1, -1, -1)
        found: dict[int, Sample] = {}
        for index in order:
            model: Any = models[index]
            passes = tuple(map(partial(seconds, model), batches, repeats[index]))
            steps = tuple(step_seconds(model, images) for images in batches if training)
            found[index] = Sample(passes, steps)
            if (
                number < warmup
            ):  # the last warm-up round decides: the first one also loads and tunes kernels
                repeats[index] = [max(1, math.ceil(LEAST_SECONDS / time)) for time in passes]
            advance()
        if number >= warmup:
            yield [found[index] for index in range(len(models))]


def speedup(plain: Run, reduced: Run, images: Tensor, rounds: int = 5) -> float:
    """How many times faster one forward pass is than another: the median of the ratios within
    interleaved rounds, after one to warm up.

    Args:
        plain: a forward pass, of a model ready for evaluation on the images' device.
        reduced: the other one.
        images: B×C×H×W, given to both.
        rounds: how many to time.
    """
    timed = interleaved_rounds((plain, reduced), (images,), rounds, warmup=1)
    return median(first.passes[0] / second.passes[0] for first, second in timed)
