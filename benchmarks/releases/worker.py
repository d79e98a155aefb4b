"""Runs one model of the checkout that ``PYTHONPATH`` names; uses contract names alone, so that any
release can be asked.

Reads the model, the strategy and its arguments as a line of JSON, then batch sizes, a line each; it
answers every line when it is done.
"""

from __future__ import annotations

import functools
import json
import sys

import timm
import torch

import tdm_lightning as tdm


@torch.inference_mode()
def main() -> None:
    """Serve until the input ends."""
    asked = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    vit = timm.create_model(asked["model"]).eval()
    strategy = getattr(tdm, asked["strategy"])(**asked["arguments"])
    model = tdm.attach(vit, strategy).eval()

    @functools.cache
    def images(count: int) -> torch.Tensor:
        return torch.randn(count, *vit.pretrained_cfg["input_size"])

    print(tdm.__file__, flush=True)
    for line in sys.stdin:
        model(images(int(line)))
        print("done", flush=True)


if __name__ == "__main__":
    main()
