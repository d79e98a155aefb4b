"""Measure methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.progress import Progress
from torch import Tensor

from tdm_lightning.compare.accuracy import top1
from tdm_lightning.compare.environment import choose_device, choose_dtype, environment_facts
from tdm_lightning.compare.memory import peak_bytes, saved_bytes
from tdm_lightning.compare.methods import Method, make_method, make_plain
from tdm_lightning.compare.runtime import Run, check_runs, check_runtime, runner, runtime_name
from tdm_lightning.compare.table import Quartiles, Row
from tdm_lightning.compare.timing import Round, interleaved_rounds, own_share, seconds
from tdm_lightning.core.checks import check_count
from tdm_lightning.errors import SettingError
from tdm_lightning.flops import ImageCosts, count_macs, default_input_size, image_costs
from tdm_lightning.strategies import Strategy
from tdm_lightning.vit import TokenReducedViT

if TYPE_CHECKING:
    from tdm_lightning.data import ImageNetDataModule


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        batch_size: images in a batch.
        rounds: rounds to time.
        warmup: rounds before them that are not counted.
        device: ``"auto"`` or torch's name of a device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, of weights and images.
        seed: of random weights and images.
        training: time training steps too.
        runtime: ``"eager"``, ``"compile"`` or ``"onnx"``; only the first tells memory, own time and
            training steps.

    Raises:
        TypeError, ValueError: if a number is none or too small, device, dtype or runtime do not
            exist, or do not go together.
    """

    batch_size: int = 16
    rounds: int = 9
    warmup: int = 2
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    training: bool = False
    runtime: str = "eager"

    def __post_init__(self) -> None:
        check_count(self.batch_size, "batch_size")
        check_count(self.rounds, "rounds")
        check_count(self.warmup, "warmup", least=0)
        check_count(self.seed, "seed", least=0)
        check_runtime(self.runtime, choose_device(self.device), choose_dtype(self.dtype))
        if self.training and self.runtime != "eager":
            raise SettingError(
                f"training steps are timed with runtime=eager, not {self.runtime}; leave one of the"
                " two out"
            )


@dataclass
class Comparison:
    """Methods, and what was measured of them so far.

    Attributes:
        plan: how they are measured.
        methods: the plain model first.
        images: the batch that they are timed on, B×C×H×W: random numbers, or real images where
            there are data.
        macs: multiply-accumulates per image, one for each method; of an adaptive one in this batch,
            padding included.
        image_costs: what each image of the batch costs by itself, by the index of each adaptive
            method.
        facts: what the numbers depend on, by name.
        memory: peak bytes, one for each method that got its turn.
        saved: bytes saved for a backward pass, likewise.
        own: share of a pass spent in the strategy's hooks, likewise; of the batch's, and of the
            first image's alone.
        rounds: complete rounds.
        accuracy: top-1 in [0, 1] by the method's index.
        interrupted: whether the user broke it off.
    """

    plan: Plan
    methods: list[Method]
    images: Tensor
    macs: list[int]
    facts: dict[str, str]
    image_costs: dict[int, ImageCosts] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    own: list[tuple[float, float]] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)
    interrupted: bool = False

    def rows(self) -> list[Row]:
        """The table's rows, medians over the rounds; ratios are taken within each round first."""
        return [self._row(index) for index in range(len(self.methods))]

    def remarks(self) -> list[str]:
        """What a reader of the table should know."""
        remarks = [
            f"no top-1 of {method.name}: {method.remark}"
            for method in self.methods
            if method.remark
        ]
        remarks += [
            f"{method.name}: the model without its masked heads and units; while it trains they are"
            " there, and a training step costs what the plain model's does"
            for method in self.methods
            if method.extracted
        ]
        for index, costs in self.image_costs.items():
            method, gmacs, tokens = self.methods[index], costs.macs / 1e9, costs.tokens.mean(dim=1)
            untrained = (
                ""
                if method.trained
                else "; without trained weights, its times go with these costs and not with others"
            )
            remarks.append(
                f"{method.name}, image by image: {gmacs.mean():.3f} ± {gmacs.std(correction=0):.3f}"
                f" GMACs (standard deviation) and {tokens.mean():.1f} ±"
                f" {tokens.std(correction=0):.1f} tokens, the mean over the blocks; the first image"
                f" alone {gmacs[0]:.3f} GMACs{untrained}"
            )
        if self.interrupted:
            remarks.append(f"interrupted after {len(self.rounds)} of {self.plan.rounds} rounds")
        return remarks

    def _row(self, index: int) -> Row:
        method, size = self.methods[index], self.plan.batch_size
        samples = [(samples[index], samples[0]) for samples in self.rounds]
        extra: dict[str, Any] = {}
        if self.plan.training:
            extra["step"] = Quartiles.of([1e3 * mine.step for mine, _ in samples])
            extra["step_speedup"] = Quartiles.of(
                [plain.step / mine.step for mine, plain in samples]
            )
        if index < len(self.memory):
            extra["memory"] = self.memory[index]
        if index < len(self.saved):
            extra |= {"saved": self.saved[index], "plain_saved": self.saved[0]}
        if index < len(self.own):
            extra["own_time"], extra["latency_own_time"] = self.own[index]
        if index in self.image_costs:
            macs = self.image_costs[index].macs
            extra |= {
                "macs_alone": macs.mean().item(),
                "macs_alone_std": macs.std(correction=0).item(),
            }
        if index in self.accuracy:
            extra["top1"] = self.accuracy[index]
        return Row(
            method.name,
            method.settings,
            parameters=sum(parameter.numel() for parameter in method.model.parameters()),
            macs=self.macs[index],
            plain_macs=self.macs[0],
            single_macs=(
                round(self.image_costs[index].macs[0].item())
                if index in self.image_costs
                else self.macs[index]
            ),
            throughput=Quartiles.of([size / mine.batch for mine, _ in samples]),
            speedup=Quartiles.of([plain.batch / mine.batch for mine, plain in samples]),
            latency=Quartiles.of([1e3 * mine.single for mine, _ in samples]),
            latency_speedup=Quartiles.of([plain.single / mine.single for mine, plain in samples]),
            **extra,
        )


def prepare(
    model: str,
    strategies: Sequence[Strategy],
    plan: Plan,
    model_kwargs: dict[str, Any] | None = None,
    weights: bool | str | None = None,
    match_gmacs: float | None = None,
    progress: Progress | None = None,
    data: ImageNetDataModule | None = None,
) -> Comparison:
    """Make the models and count what they cost; nothing is measured yet.

    Args:
        model: name of a timm ViT.
        strategies: methods that are not attached yet.
        plan: how to measure.
        model_kwargs: for ``timm.create_model``.
        weights: file with weights for all of them.
        match_gmacs: budget to solve every method's setting for, in 10⁹ multiply-accumulates per
            image.
        progress: where to show a bar.
        data: where to take the batch from; ``None``: random numbers, which do for methods of a
            fixed budget.

    Raises:
        TypeError, ValueError: if the model cannot be reduced or a strategy does not fit it, see
            :func:`make_method`.
    """
    device, dtype = choose_device(plan.device), choose_dtype(plan.dtype)
    torch.manual_seed(plan.seed)
    methods = [make_plain(model, model_kwargs or {}, weights)]
    size = default_input_size(methods[0].model)
    images = (
        torch.randn(plan.batch_size, *size) if data is None else _batch(data, plan.batch_size)
    ).to(device, dtype)
    progress = progress or Progress(disable=True)
    chosen = progress.track(strategies, description="models")
    for strategy in chosen:
        torch.manual_seed(plan.seed)  # whatever stands beside it, a method gets the same weights
        methods.append(make_method(strategy, model, model_kwargs or {}, weights, match_gmacs))
    for method in methods:
        check_runs(method.model.to(device, dtype), plan.runtime)
    facts = {
        "model": (
            f"{model}, {'×'.join(map(str, size))},"
            f" {f'weights of {weights}' if weights else 'random weights'}"
        ),
        "measured": (
            f"batch {plan.batch_size}, {plan.dtype}, {plan.rounds} interleaved rounds after"
            f" {plan.warmup} to warm up, medians and quartiles; peak memory of a pass with its"
            " weights"
        ),
        "runtime": runtime_name(plan.runtime),
        **(
            {"budget": f"settings solved for {match_gmacs} GMACs"}
            if match_gmacs is not None
            else {}
        ),
        **environment_facts(device),
    }
    per_image = {
        index: image_costs(cast(TokenReducedViT, method.model), images)
        for index, method in enumerate(methods)
        if _adaptive(method)
    }
    return Comparison(
        plan, methods, images, [_macs(method, images) for method in methods], facts, per_image
    )


def measure(
    comparison: Comparison, data: ImageNetDataModule | None = None, progress: Progress | None = None
) -> None:
    """Fill in memory, times and, with data, accuracy. An interrupt (Ctrl-C) ends it and keeps what
    there is.

    Args:
        comparison: from :func:`prepare`; changed in place.
        data: images to classify; methods whose weights are not all trained are left out.
        progress: where to show bars.
    """
    progress = progress or Progress(disable=True)
    try:
        _measure(comparison, data, progress)
    except KeyboardInterrupt:
        comparison.interrupted = True


def _measure(comparison: Comparison, data: ImageNetDataModule | None, progress: Progress) -> None:
    plan, images, models = (
        comparison.plan,
        comparison.images,
        [method.model for method in comparison.methods],
    )
    eager = plan.runtime == "eager"
    for model in progress.track(models if eager else (), description="memory"):
        comparison.memory.append(peak_bytes(model, images))
        comparison.saved.append(saved_bytes(model, images))
    runs = []
    for method in progress.track(comparison.methods, description=plan.runtime):
        runs.append(_runner(method, plan.runtime))
        if not eager:  # compiled at the first pass, for each batch size
            seconds(runs[-1], images)
            seconds(runs[-1], images[:1])
    task = progress.add_task("timing", total=len(models) * (plan.warmup + plan.rounds))
    timed = interleaved_rounds(
        runs, images, plan.rounds, plan.warmup, lambda: progress.advance(task), plan.training
    )
    for samples in timed:
        comparison.rounds.append(samples)
    for model in progress.track(models if eager else (), description="own time"):
        comparison.own.append(
            (own_share(model, images, plan.rounds), own_share(model, images[:1], plan.rounds))
        )
    if data is None:
        return
    data.setup("test")
    for index, method in enumerate(comparison.methods):
        if method.trained:
            batches = progress.track(data.test_dataloader(), description=f"top-1 {method.name}")
            comparison.accuracy[index] = top1(method.model, batches, data.num_classes)


def _runner(method: Method, runtime: str) -> Run:
    try:
        return runner(method.model, runtime)
    except ValueError as error:
        raise SettingError(
            f"{method.name} cannot be timed with runtime={runtime}: {error}"
        ) from error


def _macs(method: Method, images: Tensor) -> int:
    return count_macs(method.model, images=images if _adaptive(method) else None)


def _adaptive(method: Method) -> bool:
    return isinstance(method.model, TokenReducedViT) and method.model.strategy.adaptive


def _batch(data: ImageNetDataModule, size: int) -> Tensor:
    """The first images of the test split; again from the start where there are fewer."""
    data.setup("test")
    found: list[Tensor] = []
    while sum(map(len, found)) < size:
        for images, _ in data.test_dataloader():
            found.append(images)
            if sum(map(len, found)) >= size:
                break
    return torch.cat(found)[:size]
