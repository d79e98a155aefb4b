"""``python -m benchmarks.releases``: is a release slower than another?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner import run
from tdm_lightning.compare.timing import interleaved_rounds
from tdm_lightning.errors import FileError, SettingError

ROOT = Path(__file__).parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "TDM": {"keep_rate": 0.7},
    "EViT": {"keep_rate": 0.7},
    "ToMe": {"r": 13},
}


class Remote:
    """A model of a checkout, in a process of its own; called with images, it runs as many."""

    def __init__(self, checkout: Path, model: str, strategy: str) -> None:
        if not (checkout / "tdm_lightning" / "__init__.py").is_file():
            raise FileError(f"{checkout} is no checkout of tdm-lightning")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )
        asked = {"model": model, "strategy": strategy, "arguments": METHODS[strategy]}
        found = Path(self.ask(json.dumps(asked)))
        if checkout.resolve() not in found.resolve().parents:
            raise FileError(f"{found} was imported in place of the checkout {checkout}")

    def ask(self, line: str) -> str:
        """Send a line and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise FileError(f"the worker ended with code {self.process.wait()}")
        return answer.strip()

    def __call__(self, images: Tensor) -> None:
        """Run as many images."""
        self.ask(str(len(images)))


def releases(
    old: str | None = None,
    new: str = str(ROOT),
    model: str = "deit_small_patch16_224",
    batch_size: int = 16,
    rounds: int = 9,
) -> list[dict[str, Any]]:
    """Time TDM, EViT and ToMe of two checkouts in interleaved rounds, a process for each.

    Args:
        old: folder of a checkout, such as ``git worktree add`` makes of a tag.
        new: another; this one, if nothing is said.
        model: name of a timm ViT.
        batch_size: images in a batch; one image alone is timed too.
        rounds: times that each is timed, in turn with all others.

    Returns:
        For every method the medians and quartiles of old time ÷ new time: above 1, ``new`` is
        faster.

    Raises:
        ValueError: without a checkout to compare with, or for a folder that is none.
    """
    if old is None:
        raise SettingError("give --old FOLDER, a checkout of the release to compare with")
    remotes = [Remote(path, model, name) for name in METHODS for path in (Path(old), Path(new))]
    batches = torch.empty(batch_size), torch.empty(1)
    samples = list(interleaved_rounds(remotes, batches, rounds, warmup=2))
    table = []
    for index, name in enumerate(METHODS):
        row: dict[str, Any] = {"method": name}
        for place, what in enumerate(("batch", "single")):
            ratios = [
                found[2 * index].passes[place] / found[2 * index + 1].passes[place]
                for found in samples
            ]
            row[what] = [round(value, 3) for value in quantiles(ratios, method="inclusive")]
        print(*(f"{key}: {value}" for key, value in row.items()), flush=True)
        table.append(row)
    for remote in remotes:
        remote.process.kill()
    return table


if __name__ == "__main__":
    run(releases)
