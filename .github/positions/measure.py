"""Where should a merged token stand? Accuracy with two rules, for models whose blocks ask for positions.

for MODEL in vit_base_patch16_rope_224 vit_relpos_small_patch16_224; do
    tdm fit --config study/plain --config study/coarse --model.model $MODEL --trainer.callbacks.dirpath runs/positions/$MODEL \
        --trainer.max_epochs 2 --model.warmup_epochs 0.2 --data.dataset FOLDER
done
python .github/positions/measure.py runs/positions/*/last.ckpt --dataset FOLDER > .github/positions/results.csv

results.csv has the first of the two models, on the 6,000 held-out images, without fine-tuning (7×7 patches; torch 2.14.1,
timm 1.0.31).
"""

import argparse

import torch
from torch import Tensor

import tdm_lightning as tdm
from tdm_lightning.study.evaluate import gathered
from tdm_lightning.study.plain import Plain
from tdm_lightning.tokens import Reduction, Tokens

at_most_important = Tokens.reduced


def at_mean(tokens: Tokens, index: int, reduction: Reduction, importance: Tensor | None = None) -> Tokens:
    """The library's rule replaced: the patch nearest to the mean of all patches that a token holds."""
    reduced = at_most_important(tokens, index, reduction, importance)
    assert reduced.source is not None
    side = int(reduced.source.shape[1] ** 0.5)
    patches = torch.arange(side * side)
    place = torch.stack((patches // side, patches % side), dim=-1).float().expand(len(reduced.x), -1, -1)
    held = torch.nn.functional.one_hot(reduced.source + 1, reduced.count + 1)[:, :, 1:].float()  # what was dropped: nowhere
    mean = (held.transpose(1, 2) @ place) / held.sum(dim=1).clamp(min=1).unsqueeze(-1)
    row, column = mean.round().long().unbind(dim=-1)
    return reduced.replace(position=row * side + column)


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
    logits = torch.cat(
        [model.run(batch, trace=True).logits for batch in images.split(250)]
    )  # the trace gives the mean rule its patches
    return logits.argmax(dim=1) == labels


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
        for rule, reduced in RULES.items():
            Tokens.reduced = reduced  # type: ignore[method-assign]
            found[rule] = right(model, images, labels)
        for rule, other in zip(RULES, reversed(RULES), strict=True):
            only = int((found[rule] & ~found[other]).sum())
            print(f"{start.model},{name},{rule},{found[rule].double().mean():.4f},{only},{len(labels)}", flush=True)
