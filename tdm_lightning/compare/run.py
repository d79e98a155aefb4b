"""Measure methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.progress import Progress
from torch import Tensor

from tdm_lightning.compare.accuracy import top1
from tdm_lightning.compare.environment import choose_device, choose_dtype, environment_facts
from tdm_lightning.compare.launches import counted, launches
from tdm_lightning.compare.limit import FreeSlicing, model_method, token_counts
from tdm_lightning.compare.memory import peak_bytes, saved_bytes
from tdm_lightning.compare.methods import Method, make_method, make_plain, posters_strategies
from tdm_lightning.compare.runtime import Run, check_runs, check_runtime, runner, runtime_name
from tdm_lightning.compare.table import Quartiles, Row
from tdm_lightning.compare.timing import Round, interleaved_rounds, own_share, seconds
from tdm_lightning.core.checks import check_count
from tdm_lightning.errors import SettingError, TokenReductionError
from tdm_lightning.flops import ImageCosts, default_input_size, image_costs, mac_report
from tdm_lightning.ops import kernels
from tdm_lightning.strategies import TDM, Strategy
from tdm_lightning.vit import TokenReducedViT, linear_patches
from tdm_lightning.vit.adapters import model_info

if TYPE_CHECKING:
    from tdm_lightning.data import ImageNetDataModule


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        batch_sizes: images in a batch, one number or several; everything is measured at each.
        rounds: rounds to time.
        warmup: rounds before them that are not counted.
        device: ``"auto"`` or torch's name of a device.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``, or short ``"fp32"``, ``"bf16"``,
            ``"fp16"``, of weights and images.
        seed: of random weights and images.
        training: time training steps too.
        runtime: ``"eager"``, ``"compile"``, ``"graph"`` or ``"onnx"``; only the first tells memory,
            own time and training steps.
        limit: a row for free slicing: what the first method's token counts cost without it.
        linear_embedding: the patch embedding as reshape and linear, in all models.

    Raises:
        TypeError, ValueError: if a number is none or too small, device, precision or runtime do not
            exist, or do not go together.
    """

    batch_sizes: int | Sequence[int] = (1, 16)
    rounds: int = 9
    warmup: int = 2
    device: str = "auto"
    precision: str = "float32"
    seed: int = 0
    training: bool = False
    runtime: str = "eager"
    limit: bool = False
    linear_embedding: bool = False

    def __post_init__(self) -> None:
        check_batch_sizes(self.batch_sizes)
        check_count(self.rounds, "rounds")
        check_count(self.warmup, "warmup", least=0)
        check_count(self.seed, "seed", least=0)
        check_runtime(self.runtime, choose_device(self.device), choose_dtype(self.precision))
        if self.training and self.runtime != "eager":
            raise SettingError(
                f"training steps are timed with runtime=eager, not {self.runtime}; leave one of the"
                " two out"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes."""
        return check_batch_sizes(self.batch_sizes)


def check_batch_sizes(sizes: Any) -> tuple[int, ...]:
    """One batch size or several, each once.

    Raises:
        TypeError: if they are no integers.
        ValueError: if one is below 1, two are equal, or there is none.
    """
    listed = isinstance(sizes, Sequence) and not isinstance(sizes, str)
    found = tuple(check_count(size, "batch_sizes") for size in (sizes if listed else [sizes]))
    if not found or len(set(found)) < len(found):
        raise SettingError(f"batch_sizes must be different numbers, at least one, got {sizes!r}")
    return found


#: A method's index and a batch size.
Cell = tuple[int, int]


@dataclass
class Comparison:
    """Methods, and what was measured of them so far.

    Attributes:
        plan: how they are measured.
        methods: the plain model first, then free slicing where that is asked for.
        images: the largest batch that they are timed on, B×C×H×W; smaller ones are its first
            images: random numbers, or real images where there are data.
        macs: multiply-accumulates per image, by method and batch size; of an adaptive one in that
            batch, padding included.
        run_macs: all that a pass does, likewise.
        image_costs: what each image of the batch costs by itself, by the index of each adaptive
            method.
        facts: what the numbers depend on, by name.
        launches: by method and batch size, as far as they got their turn.
        memory: peak bytes, likewise.
        saved: bytes saved for a backward pass, likewise.
        own: share of a pass spent in the strategy's hooks, likewise.
        rounds: complete rounds.
        accuracy: top-1 in [0, 1] by the method's index.
        interrupted: whether the user broke it off.
    """

    plan: Plan
    methods: list[Method]
    images: Tensor
    macs: dict[Cell, int]
    facts: dict[str, str]
    image_costs: dict[int, ImageCosts] = field(default_factory=dict)
    run_macs: dict[Cell, int] = field(default_factory=dict)
    launches: dict[Cell, int] = field(default_factory=dict)
    memory: dict[Cell, int] = field(default_factory=dict)
    saved: dict[Cell, int] = field(default_factory=dict)
    own: dict[Cell, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def batches(self) -> list[Tensor]:
        """The images of each batch size."""
        return [self.images[:size] for size in self.plan.sizes]

    def rows(self) -> list[Row]:
        """The table's rows, all methods at one batch size and then at the next: medians over the
        rounds; ratios are taken within each round first.
        """
        return [
            self._row(index, place)
            for place in range(len(self.plan.sizes))
            for index in range(len(self.methods))
        ]

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
                f" {tokens.std(correction=0):.1f} tokens, the mean over the blocks{untrained}"
            )
        if self.interrupted:
            remarks.append(f"interrupted after {len(self.rounds)} of {self.plan.rounds} rounds")
        return remarks

    def _row(self, index: int, place: int) -> Row:
        method, size = self.methods[index], self.plan.sizes[place]
        cell = index, size
        times = [[sample.passes[place] for sample in samples] for samples in self.rounds]
        steps = [
            [sample.steps[place] for sample in samples]
            for samples in self.rounds
            if self.plan.training
        ]
        extra: dict[str, Any] = {"launches": self.launches.get(cell, math.nan)}
        if self.plan.limit:
            extra["limit_speedup"] = Quartiles.of([each[1] / each[index] for each in times])
        if cell in self.saved:
            extra |= {"saved": self.saved[cell], "plain_saved": self.saved[0, size]}
        if index in self.image_costs:
            macs = self.image_costs[index].macs
            extra |= {
                "macs_alone": macs.mean().item(),
                "macs_alone_std": macs.std(correction=0).item(),
            }
        return Row(
            method.name,
            method.settings,
            batch=size,
            parameters=sum(parameter.numel() for parameter in method.model.parameters()),
            macs=self.macs[cell],
            plain_macs=self.macs[0, size],
            run_macs=self.run_macs[cell],
            throughput=Quartiles.of([size / each[index] for each in times]),
            speedup=Quartiles.of([each[0] / each[index] for each in times]),
            time=Quartiles.of([1e3 * each[index] for each in times]),
            step=Quartiles.of([1e3 * each[index] for each in steps]),
            step_speedup=Quartiles.of([each[0] / each[index] for each in steps]),
            memory=self.memory.get(cell, math.nan),
            own_time=self.own.get(cell, math.nan),
            top1=self.accuracy.get(index, math.nan),
            **extra,
        )


def prepare(
    model: str,
    strategies: Sequence[Strategy] | None,
    plan: Plan,
    model_kwargs: dict[str, Any] | None = None,
    weights: bool | str | None = None,
    match_gmacs: float | None = None,
    progress: Progress | None = None,
    data: ImageNetDataModule | None = None,
) -> Comparison:
    """Make the models and count what they cost; nothing is measured yet.

    Args:
        model: name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        strategies: methods that are not attached yet; ``None``: :func:`posters_strategies`, but for
            those that this model or the plan does not take.
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
    device, dtype = choose_device(plan.device), choose_dtype(plan.precision)
    torch.manual_seed(plan.seed)
    methods = [make_plain(model, model_kwargs or {}, weights)]
    if data is not None and methods[0].runs is not methods[0].model:
        raise SettingError(
            f"{model} gives features and no logits, so its accuracy cannot be told; leave data out,"
            " or take timm's model of the same weights"
        )
    size, most = default_input_size(methods[0].model), max(plan.sizes)
    images = (torch.randn(most, *size) if data is None else _batch(data, most)).to(device, dtype)
    progress = progress or Progress(disable=True)
    left_out, usual, shallow = [], strategies is None, False
    depth = model_info(methods[0].model).depth
    if strategies is None:
        shallow = depth <= max(TDM().layers)
        strategies = posters_strategies(match_gmacs is not None, plan.runtime != "eager", depth)
    for strategy in progress.track(strategies, description="models"):
        torch.manual_seed(plan.seed)  # whatever stands beside it, a method gets the same weights
        try:
            methods.append(make_method(strategy, model, model_kwargs or {}, weights, match_gmacs))
        except TokenReductionError as error:
            if not usual:
                raise
            left_out.append(str(error))
    for method in methods:
        check_runs(method.model.to(device, dtype), plan.runtime)
    if plan.limit:
        like = model_method(methods)
        torch.manual_seed(plan.seed)
        slicing = FreeSlicing(token_counts(cast(TokenReducedViT, like.model), images))
        sliced = make_method(slicing, model, model_kwargs or {})
        sliced.model.to(device, dtype)
        settings = f"as many tokens as {like.name}({like.settings})"
        methods.insert(1, replace(sliced, name="free slicing", settings=settings))
    for method in methods:
        if plan.linear_embedding:
            linear_patches(method.model)
    facts = {
        "model": (
            f"{model}, {'×'.join(map(str, size))},"
            f" {f'weights of {weights}' if weights else 'random weights'}"
        ),
        "measured": (
            f"batches of {', '.join(map(str, plan.sizes))}, {str(dtype).removeprefix('torch.')},"
            f" {plan.rounds} interleaved rounds after {plan.warmup} to warm up, medians and"
            " quartiles; peak memory of a pass with its weights"
        ),
        "GMACs": (
            "as papers count; run: all that a pass does, a method's own work too, and of the last"
            " block what the head reads"
        ),
        "counted as launches": counted(device),
        "runtime": runtime_name(plan.runtime),
        "kernels": kernels.current(),
        "patch embedding": (
            "as reshape and linear, in all models, the plain one too"
            if plan.linear_embedding
            else "as the model has it"
        ),
        **(
            {"budget": f"settings solved for {match_gmacs} GMACs"}
            if match_gmacs is not None
            else {}
        ),
        **({"usual layers": f"as far into these {depth} blocks"} if shallow else {}),
        **({"left out": "; ".join(left_out)} if left_out else {}),
        **environment_facts(device),
    }
    per_image = {
        index: image_costs(cast(TokenReducedViT, method.model), images)
        for index, method in enumerate(methods)
        if _adaptive(method)
    }
    macs, run_macs = _all_macs(methods, images, plan)
    return Comparison(plan, methods, images, macs, facts, per_image, run_macs)


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
    plan, batches = comparison.plan, comparison.batches
    models = [method.runs for method in comparison.methods]
    eager = plan.runtime == "eager"
    cells = [
        (index, images) for images in batches for index in range(len(models))
    ]  # as the rows stand
    for index, images in progress.track(cells if eager else (), description="memory"):
        comparison.memory[index, len(images)] = peak_bytes(models[index], images)
        comparison.saved[index, len(images)] = saved_bytes(models[index], images)
    runs = []
    for method in progress.track(comparison.methods, description=plan.runtime):
        runs.append(_runner(method, plan.runtime))
        if not eager:  # compiled or captured at the first pass, for each batch size
            for images in batches:
                seconds(runs[-1], images)
    count = eager or comparison.images.is_cuda  # operations cannot be seen inside what is compiled
    for index, images in progress.track(cells if count else (), description="launches"):
        comparison.launches[index, len(images)] = launches(runs[index], images)
    task = progress.add_task("timing", total=len(models) * (plan.warmup + plan.rounds))
    timed = interleaved_rounds(
        runs, batches, plan.rounds, plan.warmup, lambda: progress.advance(task), plan.training
    )
    for samples in timed:
        comparison.rounds.append(samples)
    for index, images in progress.track(cells if eager else (), description="own time"):
        model = comparison.methods[index].model
        comparison.own[index, len(images)] = own_share(model, images, plan.rounds)
    if data is None:
        return
    data.setup("test")
    for index, method in enumerate(comparison.methods):
        if method.trained:
            labelled = progress.track(data.test_dataloader(), description=f"top-1 {method.name}")
            comparison.accuracy[index] = top1(method.model, labelled, data.num_classes)


def _runner(method: Method, runtime: str) -> Run:
    try:
        return runner(method.runs, runtime)
    except ValueError as error:
        raise SettingError(
            f"{method.name} cannot be timed with runtime={runtime}: {error}"
        ) from error


def _all_macs(
    methods: Sequence[Method], images: Tensor, plan: Plan
) -> tuple[dict[Cell, int], dict[Cell, int]]:
    """Multiply-accumulates as papers count them, and all that a pass does."""
    counted, run = {}, {}
    for index, method in enumerate(methods):
        fixed = None if _adaptive(method) else mac_report(method.model)
        for size in plan.sizes:
            report = fixed or mac_report(method.model, images=images[:size])
            counted[index, size] = round(report.backbone)
            run[index, size] = round(report.forward)
    return counted, run


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
