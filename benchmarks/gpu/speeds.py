"""The rows that the goals are about: methods beside plain timm and free slicing in one process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from torch import nn

import tdm_lightning as tdm
from benchmarks.gpu.journal import Entry, Task
from benchmarks.gpu.models import Formed
from tdm_lightning.compare.launches import launches
from tdm_lightning.compare.limit import FreeSlicing
from tdm_lightning.compare.methods import describe
from tdm_lightning.compare.runtime import runner
from tdm_lightning.compare.table import Quartiles
from tdm_lightning.compare.timing import Round, interleaved_rounds, seconds

#: At DeiT-S's cost under TDM with a keep rate of 0.7, MAC ratio 1.535, to within half a percent.
METHODS: dict[str, Callable[[], tdm.Strategy]] = {
    "TDM": lambda: tdm.TDM(0.7),
    "WardTDM, 3 blocks": lambda: tdm.WardTDM(0.7, (3, 6, 9)),
    "WardTDM, 4 blocks": lambda: tdm.WardTDM(0.828),
    "EViT": lambda: tdm.EViT(0.693),
    "TopK": lambda: tdm.TopK(0.706),
    "ToMe": lambda: tdm.ToMe(keep_rate=0.926),
}
_OURS = ("TDM", "WardTDM, 3 blocks", "WardTDM, 4 blocks")


def _goal(least: float) -> dict[str, float]:
    return dict.fromkeys(_OURS, least)


@dataclass(frozen=True)
class Case:
    """What is timed together, in interleaved rounds.

    Attributes:
        name: what a reader calls it.
        model: name of a timm model.
        batch: images in a pass.
        mode: ``"eager"``, ``"compile"``, ``"graph"`` or ``"training"``.
        precision: of weights and images; in training that of autocast.
        methods: of :data:`METHODS`.
        goals: least ratio to plain timm, by method.
        embeddings: whether patches are embedded by a linear map, each way to be timed.
        counted: tell launches.
    """

    name: str
    model: str
    batch: int
    mode: str = "eager"
    precision: torch.dtype = torch.bfloat16
    methods: tuple[str, ...] = tuple(METHODS)
    goals: dict[str, float] = field(default_factory=dict)
    embeddings: tuple[bool, ...] = (False, True)
    counted: bool = False


_SMALL, _BASE = "deit_small_patch16_224", "deit_base_patch16_224"

#: In order of value.
CASES = [
    Case("DeiT-S, batch 256", _SMALL, 256, goals=_goal(1.2), counted=True),
    Case("DeiT-S, batch 32, graph", _SMALL, 32, "graph", goals=_goal(1.15)),
    Case("DeiT-S, batch 1, graph", _SMALL, 1, "graph", goals=_goal(1.0)),
    Case("DeiT-S, training, batch 128", _SMALL, 128, "training", goals=_goal(1.2)),
    Case("DeiT-B, batch 256", _BASE, 256, goals=_goal(1.27), methods=_OURS),
    Case("DINOv2-S at 518, batch 32", "vit_small_patch14_dinov2", 32, goals=_goal(1.35)),
    Case("DeiT-S, batch 32", _SMALL, 32),
    Case("DeiT-S, batch 1", _SMALL, 1),
]
_COMPILED = [
    Case(
        "DeiT-S, batch 256, compiled",
        _SMALL,
        256,
        "compile",
        goals=_goal(1.25),
        methods=_OURS,
        embeddings=(False,),
    )
]

#: The same code in seconds on a CPU; no goal is of these.
_TINY = [
    Case("tiny", "deit_tiny_patch16_224", 2, precision=torch.float32, counted=True),
    Case("tiny, training", "deit_tiny_patch16_224", 2, "training", methods=("TDM",)),
]


@dataclass(frozen=True)
class Contender:
    """A model in a case.

    Attributes:
        method: its name.
        settings: its arguments.
        form: of the kernels.
        linear: whether its patches are embedded by a linear map.
        model: in evaluation mode, on the device.
    """

    method: str
    settings: str
    form: str
    linear: bool
    model: nn.Module


def tasks(device: torch.device, forms: list[str], quick: bool, rounds: int) -> Iterator[Task]:
    """One task per case but the compiled one."""
    for case in _TINY if quick else CASES:
        yield {"case": case.name}, partial(timed, case, device, forms, rounds)


def compiled_tasks(device: torch.device, forms: list[str], rounds: int) -> Iterator[Task]:
    """The compiled case, which takes minutes: our methods in the last of the forms."""
    for case in _COMPILED:
        yield {"case": case.name}, partial(timed, case, device, forms[-1:], rounds)


def timed(case: Case, device: torch.device, forms: list[str], rounds: int) -> Entry:
    """A row for each contender: ratios within rounds, to plain timm and to free slicing with the
    same patch embedding.
    """
    torch.compiler.reset()
    contenders = _contenders(case, device, forms)
    training = case.mode == "training"
    dtype = torch.float32 if training else case.precision
    autocast = case.precision if training else None
    vit: Any = contenders[0].model
    images = torch.randn(case.batch, 3, *vit.patch_embed.img_size, device=device, dtype=dtype)
    runs: list[Any] = [_run(case, each, autocast) for each in contenders]
    for run in runs:  # compiled or captured at the first pass
        seconds(run, images)
    found = list(interleaved_rounds(runs, [images], rounds, 2, training=training))
    rows = []
    for index, each in enumerate(contenders):
        same = [i for i, other in enumerate(contenders) if other.linear == each.linear]
        row = {
            "method": each.method,
            "settings": each.settings,
            "form": each.form,
            "linear_embedding": each.linear,
            "mac_ratio": _mac_ratio(case.model, each.method),
            **_times(found, index, same[0], same[1], training),
        }
        if case.counted:
            row["launches"] = launches(runs[index], images)
        if each.method in case.goals:
            row["goal"] = case.goals[each.method]
            row["ok"] = row["ratio_to_plain"] >= row["goal"]
        rows.append(row)
    del contenders, runs, vit
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    facts = {"model": case.model, "batch": case.batch, "mode": case.mode, "rounds": rounds}
    return {**facts, "precision": str(case.precision).removeprefix("torch."), "rows": rows}


def _contenders(case: Case, device: torch.device, forms: list[str]) -> list[Contender]:
    """Plain timm and free slicing, then the methods in each form; all share their weights."""
    torch.manual_seed(0)
    dtype = torch.float32 if case.mode == "training" else case.precision
    with device:
        base = timm.create_model(case.model, num_classes=1000).eval().to(dtype)
    found = []
    for linear in case.embeddings:
        vit = tdm.linear_patches(copy.deepcopy(base)) if linear else base
        images = torch.zeros(1, 3, *base.patch_embed.img_size, device=device, dtype=dtype)
        with torch.no_grad():
            counts = tdm.attach(vit, METHODS["TDM"]()).eval().trace(images)[1].token_counts
        sliced = tdm.attach(vit, FreeSlicing(counts)).eval()
        found += [
            Contender("plain", "", "torch", linear, vit),
            Contender("free slicing", "as many tokens as TDM", "torch", linear, sliced),
        ]
        for form in forms:
            for name in case.methods:
                strategy = METHODS[name]()
                _, settings = describe(strategy)
                model = tdm.attach(vit, strategy).eval()
                found.append(Contender(name, settings, form, linear, model))
    return found


def _run(case: Case, contender: Contender, autocast: torch.dtype | None) -> Any:
    formed = Formed(contender.model, contender.form, autocast)
    if case.mode in ("eager", "training"):
        return formed
    if case.mode == "graph":
        return runner(formed, "graph")
    inner = runner(contender.model, "compile")  # the choice of the form stays outside the graph

    def run(images: torch.Tensor) -> Any:
        with tdm.kernels.use(contender.form):  # type: ignore[arg-type]
            return inner(images)

    return run


def _times(found: list[Round], index: int, plain: int, limit: int, training: bool) -> Entry:
    def of(place: int) -> list[float]:
        kinds = ([sample.steps, sample.passes][not training] for sample in _column(found, place))
        return [each[0] for each in kinds]

    mine = of(index)
    against = [base / time for base, time in zip(of(plain), mine, strict=True)]
    sliced = [base / time for base, time in zip(of(limit), mine, strict=True)]
    time, ratio = Quartiles.of([1e3 * each for each in mine]), Quartiles.of(against)
    return {
        "ms": time.median,
        "ms_quartiles": [time.q1, time.q3],
        "ratio_to_plain": ratio.median,
        "ratio_to_plain_quartiles": [ratio.q1, ratio.q3],
        "ratio_to_free_slicing": Quartiles.of(sliced).median,
    }


def _column(found: list[Round], place: int) -> list[Any]:
    return [samples[place] for samples in found]


@lru_cache
def _mac_ratio(model: str, method: str) -> float:
    """Of a method whatever its form, free slicing having that of TDM."""
    if method == "plain":
        return 1.0
    with torch.device("meta"):
        vit = timm.create_model(model)
        reduced = tdm.attach(vit, METHODS["TDM" if method == "free slicing" else method]())
    return tdm.flops.count_macs(vit) / tdm.flops.count_macs(reduced)
