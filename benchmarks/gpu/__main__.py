"""``python -m benchmarks.gpu``: what a GPU for a quarter of an hour can tell."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks, operations, speeds
from benchmarks.gpu.journal import Entry, Journal
from benchmarks.runner import run
from tdm_lightning.compare import timing
from tdm_lightning.compare.environment import choose_device, environment_facts
from tdm_lightning.core.checks import check_count, check_number
from tdm_lightning.ops.kernels.choice import unable


def gpu(
    out: str = "gpu.json",
    device: str = "cuda",
    quick: bool = False,
    minutes: float = 6.0,
    rounds: int = 7,
) -> dict[str, Any]:
    """Correctness of every strategy and operation on a device, and speed beside plain timm.

    Args:
        out: JSON file, whole after every entry, so that a run that is cut off leaves what it has.
        device: ``cuda``, ``cuda:1``, or ``cpu`` with ``quick``.
        quick: tiny models and few methods: tries this program, and measures nothing.
        minutes: after which no further entry is begun; what was left out is listed.
        rounds: times that each model is timed, in turn with all others.

    Returns:
        What the file holds.

    Raises:
        ValueError: if there is no such device, or a number is too small.
    """
    where = choose_device(device)
    check_number(minutes, "minutes", above=True)
    check_count(rounds, "rounds")
    reason = unable(where.type, where.index)
    forms = ["torch"] if reason or where.type == "cpu" else ["torch", "triton"]
    facts = {**environment_facts(where), **_device_facts(where), "forms": forms, "quick": quick}
    if reason:
        facts["no triton"] = reason
    torch.backends.cudnn.allow_tf32 = False  # the checks compare with the CPU's float32
    journal = Journal(Path(out), minutes, facts)
    if quick:
        rounds, least, timing.LEAST_SECONDS = 1, timing.LEAST_SECONDS, 0.0
    journal.section("correctness", checks.tasks(where, forms, quick))
    if "triton" in forms:
        journal.section("operations", operations.tasks(where))
    journal.section("speed", speeds.tasks(where, forms, quick, rounds), needs=0 if quick else 20)
    journal.section("compiled correctness", checks.compile_tasks(where, forms[-1:], quick))
    if quick:
        timing.LEAST_SECONDS = least
    else:
        journal.section("compiled speed", speeds.compiled_tasks(where, forms, rounds), needs=100)
    return journal.found


def _device_facts(device: torch.device) -> Entry:
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    found: Entry = {"triton": triton, "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "0")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


if __name__ == "__main__":
    run(gpu)
