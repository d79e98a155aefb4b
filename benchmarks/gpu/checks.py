"""Is every strategy right on a device? Against float32 on the CPU, where the tests look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tdm_lightning as tdm
from benchmarks.gpu.journal import Entry, Task, attempted
from benchmarks.gpu.models import SHAPE, Formed, drawn, small, strategies
from tdm_lightning.errors import SettingError

#: Largest difference allowed in float32, relative to the largest number; and the least cosine of
#: each image's logits in half precision, where another token may win.
_TOLERANCE, _COSINE = 2e-3, 0.9

_BATCH = 4


def tasks(device: torch.device, forms: list[str], few: bool = False) -> Iterator[Task]:
    """One task per strategy and form: all checks but compiling.

    Args:
        device: where the models run.
        forms: of the kernels.
        few: three strategies only.
    """
    for form in forms:
        for name, strategy in _chosen(few):
            yield {"method": name, "form": form}, partial(_checked, strategy, form, device)


def compile_tasks(device: torch.device, forms: list[str], few: bool = False) -> Iterator[Task]:
    """One task per strategy of a fixed budget and form: is the compiled pass the eager one?"""
    for form in forms:
        for name, strategy in _chosen(few):
            if not strategy.adaptive:
                yield {"method": name, "form": form}, partial(_compiled, strategy, form, device)


def _chosen(few: bool) -> list[tuple[str, tdm.Strategy]]:
    found = list(strategies().items())
    return [(n, s) for n, s in found if n in ("TDM", "AViT", "ToMe")] if few else found


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    side = SHAPE["img_size"]
    return torch.randn(_BATCH, 3, side, side, generator=generator)


def _checked(strategy: tdm.Strategy, form: str, device: torch.device) -> Entry:
    """Every check by name: whether it holds, and by how much."""
    reference, images = small(strategy), _images()
    expected = Formed(reference, "torch")(images)
    expected.square().sum().backward()
    wanted = torch.cat([weight.grad.flatten() for weight in _weights(reference)])
    reference.zero_grad()
    model = copy.deepcopy(reference).to(device)
    fast, there, random = Formed(model, form), images.to(device), drawn(strategy)
    with torch.no_grad():
        eager = fast(there)

    def against(found: Tensor, other: Tensor) -> Entry:
        gap = _gap(found, other)
        return {"ok": bool(found.isfinite().all()) and (random or gap <= _TOLERANCE), "gap": gap}

    def backward() -> Entry:
        fast(there).square().sum().backward()
        found = torch.cat([weight.grad.flatten() for weight in _weights(model)])
        model.zero_grad()
        return against(found, wanted)

    def half(dtype: torch.dtype) -> Entry:
        lower = Formed(copy.deepcopy(model).to(dtype), form)
        with torch.no_grad():
            return _alike(lower(there.to(dtype)), eager, random)

    def autocast(dtype: torch.dtype) -> Entry:
        found = Formed(model, form, dtype)(there)
        found.float().square().sum().backward()
        finite = all(bool(weight.grad.isfinite().all()) for weight in _weights(model))
        model.zero_grad()
        result = _alike(found.detach(), eager, random)
        return {**result, "ok": result["ok"] and finite}

    def inference() -> Entry:
        with torch.inference_mode():
            return against(fast(there), eager)

    checks: dict[str, Callable[[], Entry]] = {
        "forward": lambda: against(eager, expected.detach().to(device)),
        "backward": backward,
        "bfloat16": partial(half, torch.bfloat16),
        "float16": partial(half, torch.float16),
        "autocast bfloat16": partial(autocast, torch.bfloat16),
        "autocast float16": partial(autocast, torch.float16),
        "inference_mode": inference,
        "graph": lambda: _graph(fast, there, strategy.adaptive, against),
    }
    found = {name: attempted(check) for name, check in checks.items()}
    return {"ok": all(entry["ok"] for entry in found.values()), "checks": found}


@torch.no_grad()
def _graph(
    fast: Formed, images: Tensor, adaptive: bool, against: Callable[[Tensor, Tensor], Entry]
) -> Entry:
    """A replay gives the eager logits of other images, and another shape and dtype run eagerly;
    what decides image by image is refused.
    """
    try:
        captured = tdm.accelerate(fast, torch.zeros_like(images))
    except SettingError as error:
        return {"ok": adaptive, "refused": str(error)}
    result = against(captured(images), fast(images))
    other = against(captured(images[:1]), fast(images[:1]))
    right = captured.captured == (images.device.type == "cuda") and not adaptive
    return {**result, "ok": result["ok"] and other["ok"] and right, "captured": captured.captured}


def _compiled(strategy: tdm.Strategy, form: str, device: torch.device) -> Entry:
    model, images = Formed(small(strategy).to(device), form), _images().to(device)
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with torch.no_grad(), tdm.kernels.use(form):  # type: ignore[arg-type]
        eager = model.model(images)
        found = torch.compile(model.model, fullgraph=True, dynamic=False, backend=backend)(images)
        again = model.model(images)
    gap = max(_gap(found, eager), _gap(again, eager))
    return {"ok": drawn(strategy) or gap <= _TOLERANCE, "gap": gap}


def _weights(model: tdm.TokenReducedViT) -> list[Any]:
    """The weights that a gradient reaches."""
    return [weight for weight in model.vit.parameters() if weight.grad is not None]


def _gap(found: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    other = other.to(found.device)
    return ((found - other).abs().max() / other.abs().max()).item()


def _alike(found: Tensor, eager: Tensor, random: bool) -> Entry:
    cosine = torch.nn.functional.cosine_similarity(found.float(), eager.float(), dim=1).min().item()
    return {
        "ok": bool(found.isfinite().all()) and (random or cosine >= _COSINE),
        "cosine": cosine,
    }
