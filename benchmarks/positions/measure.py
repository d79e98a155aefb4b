"""Where should a merged token stand? Accuracy with two rules, for models whose blocks ask for
positions.

for MODEL in vit_base_patch16_rope_224 vit_relpos_small_patch16_224; do
    tdm fit --config study/plain --config study/coarse --model.model $MODEL
    --trainer.callbacks.dirpath runs/positions/$MODEL \
        --trainer.max_epochs 2 --model.warmup_epochs 0.2 --data.dataset FOLDER
done python .github/positions/measure.py runs/positions/*/last.ckpt --dataset FOLDER >
.github/positions/results.csv

results.csv: both models on the 6,000 held-out images, without fine-tuning (7×7 patches; torch
2.14.1, timm 1.0.31).
"""

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tdm_lightning as tdm
from benchmarks.study.evaluate import gathered
from benchmarks.study.plain import Plain
from tdm_lightning.core import Tokens

reduced = Tokens.reduced


def at_most_important(tokens: Tokens, *reduction: Any) -> Tokens:
    """What the library does under rotary positions."""
    return reduced(_with_columns(tokens, None), *reduction)


def at_mean(tokens: Tokens, *reduction: Any) -> Tokens:
    """What it does under a relative position bias."""
    return reduced(_with_columns(tokens, 7), *reduction)


def _with_columns(tokens: Tokens, columns: int | None) -> Tokens:
    assert tokens.positions is not None
    size = torch.ones_like(tokens.patches[..., 0]) if tokens.size is None else tokens.size
    return tokens.replace(positions=replace(tokens.positions, columns=columns), size=size)


RULES = {"most important": at_most_important, "mean": at_mean}
STRATEGIES = {
    "TDM 0.7": lambda: tdm.TDM(0.7),
    "TDM 0.5": lambda: tdm.TDM(0.5),
    "TDM 0.3": lambda: tdm.TDM(0.3),
    "DPCKNN 0.5": lambda: tdm.DPCKNN(0.5),
    "ToMe r=3": lambda: tdm.ToMe(3),
}


@torch.inference_mode()
def right(model: tdm.TokenReducedViT, images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(250)]).argmax(dim=1) == labels


parser = argparse.ArgumentParser()
parser.add_argument("checkpoints", nargs="+")
parser.add_argument("--dataset", default="zalando-datasets/fashion_mnist")
arguments = parser.parse_args()
print("model,strategy,rule,accuracy,only this rule right,images")
for path in arguments.checkpoints:
    start = Plain.read(path)
    data = tdm.ImageNetDataModule(
        arguments.dataset,
        val_split=None,
        val_holdout=0.1,
        model=start.model,
        model_kwargs=start.model_kwargs,
        crop_pct=1.0,
        num_workers=0,
    )
    data.setup("validate")
    images, labels = gathered(data.val_dataloader())
    for name, strategy in {"plain": tdm.Strategy, **STRATEGIES}.items():
        model = start.under(strategy()).model.eval()
        found = {}
        for rule, placed in RULES.items():
            Tokens.reduced = placed  # type: ignore[method-assign]
            found[rule] = right(model, images, labels)
        for rule, other in zip(RULES, reversed(RULES), strict=True):
            only = int((found[rule] & ~found[other]).sum())
            print(
                f"{start.model},{name},{rule},{found[rule].double().mean():.4f},{only},{len(labels)}",
                flush=True,
            )
