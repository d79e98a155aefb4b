"""``python -m benchmarks.scenes.train``: the unreduced model of the scenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightning.pytorch import Trainer
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.runner import run
from benchmarks.scenes.draw import SIDE
from benchmarks.scenes.split import Garments, draw_scenes, read_garments
from tdm_lightning.core.tables import append_csv
from tdm_lightning.training.module import TokenReductionClassifier
from tdm_lightning.visualize.sheet import make_folder

MODEL = "vit_tiny_patch16_224"
PATCH, CLASSES = 4, 10


def train(
    garments: str = "zalando-datasets/fashion_mnist",
    out: str = "runs/scenes",
    width: int = 96,
    coarse_steps: int = 3000,
    steps: int = 700,
    batch_size: int = 128,
    lr: float = 2e-3,
    start: str | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> Path:
    """Train a ViT of twelve blocks on fresh scenes, first at half their size (7×7 patches), then at
    full size (14×14).

    Beside the class of the scene it learns which class, if any, the garment in each patch has
    (Jiang et al., "All Tokens Matter", NeurIPS 2021), which the drawing knows; that head is thrown
    away. Goes on where it was broken off. Writes ``log.csv`` and ``plain.ckpt`` with weights in
    half precision, which ``benchmarks.study`` takes.

    Args:
        garments: Fashion-MNIST: a folder with its files, or its name on the hub.
        out: folder to write.
        width: of the model, 32 for each head.
        coarse_steps: updates at half size.
        steps: updates at full size.
        batch_size: scenes in an update.
        lr: highest learning rate at half size; half of that at full size.
        start: a ``plain.ckpt`` to go on from instead of random weights.
        bf16: compute in bfloat16: half the time on a CPU that has it, ten times on one that has
            not.
        seed: of everything random.

    Returns:
        The checkpoint.
    """
    folder = make_folder(out)
    torch.manual_seed(seed)
    parts = read_garments(garments)
    state = None if start is None else torch.load(start, weights_only=True)["state_dict"]
    weights = None if state is None else {k.removeprefix("model.vit."): v for k, v in state.items()}
    done = 0
    for side, count, rate in ((SIDE // 2, coarse_steps, lr), (SIDE, steps, lr / 2)):
        if not count:
            continue
        model = _model(side, width)
        if weights is not None:
            model.load_state_dict(_resized(weights, model), strict=False)
        _stage(model, parts, folder, count, batch_size, rate, done * batch_size, bf16, seed)
        weights, done = model.state_dict(), done + count
    assert weights is not None
    return _written(folder / "plain.ckpt", model)


def _stage(
    model: Any,
    parts: dict[str, Garments],
    folder: Path,
    steps: int,
    batch_size: int,
    lr: float,
    first: int,
    bf16: bool,
    seed: int,
) -> None:
    """Updates at one size of the scenes; ``first``: the number of the first scene."""
    side = model.patch_embed.img_size[0]
    dense = nn.Linear(model.embed_dim, CLASSES + 1)
    both = nn.ModuleList([model, dense])
    if bf16:  # the CPU's fused attention is slow backwards in bfloat16
        for block in model.blocks:
            block.attn.fused_attn = False
    optimizer = create_optimizer_v2(both, opt="muon", lr=lr, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, steps, lr_min=lr / 50, warmup_t=min(200, steps // 5), t_in_epochs=False
    )
    kept, begin = folder / f"stage{side}.pt", 0
    if kept.exists():
        stored = torch.load(kept, weights_only=True)
        both.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        begin = stored["step"]
    scenes = _batches(parts["train"], first + begin * batch_size, batch_size, side, seed)
    for step in range(begin, steps):
        schedule.step_update(step)
        images, labels, shares = next(scenes)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = model.forward_features(images)
            logits, local = model.forward_head(features), dense(features[:, 1:])
        loss = F.cross_entropy(logits.float(), labels)
        whole = loss + 0.5 * F.cross_entropy(local.float().flatten(0, 1), shares.flatten(0, 1))
        optimizer.zero_grad()
        whole.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            row = {"side": side, "step": step + 1, "loss": f"{loss.item():.4f}", "top1": ""}
            if (step + 1) % 250 == 0 or step + 1 == steps:
                row["top1"] = f"{_accuracy(model, parts['validation'], side):.4f}"
                stored = {"model": both.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**stored, "step": step + 1}, kept)
            append_csv(folder / "log.csv", row)


@torch.no_grad()
def _accuracy(model: nn.Module, garments: Garments, side: int, count: int = 1000) -> float:
    model.eval()
    images, labels, _ = next(_batches(garments, 0, count, side, 0))
    right = [
        model(batch).argmax(dim=1) == target
        for batch, target in zip(images.split(100), labels.split(100), strict=True)
    ]
    model.train()
    return torch.cat(right).double().mean().item()


def _batches(
    garments: Garments, first: int, size: int, side: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images B×1×H×W, labels B, and for every patch the shares of the classes and of no garment,
    B×N×11.
    """
    while True:
        drawn = list(draw_scenes(garments, first, size, seed))
        images = torch.from_numpy(np.stack([scene.image for scene in drawn])).unsqueeze(1)
        images = F.interpolate(images.float(), (side, side), mode="area") / 127.5 - 1
        labels = torch.tensor([scene.label for scene in drawn])
        masks = torch.from_numpy(np.stack([scene.mask for scene in drawn])).unsqueeze(1)
        covered = F.adaptive_avg_pool2d(masks.float() / 255, side // PATCH).flatten(1).unsqueeze(2)
        shares = F.one_hot(labels, CLASSES + 1).float().unsqueeze(1) * covered
        shares[..., CLASSES:] = 1 - covered
        yield images, labels, shares
        first += size


def _kwargs(side: int, width: int) -> dict[str, Any]:
    shape = {"img_size": side, "patch_size": PATCH, "in_chans": 1, "num_classes": CLASSES}
    return {**shape, "embed_dim": width, "num_heads": width // 32}


def _model(side: int, width: int) -> Any:
    return timm.create_model(MODEL, **_kwargs(side, width))


def _resized(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights with the position embedding of another grid."""
    grid = list(model.patch_embed.grid_size)
    place = resample_abs_pos_embed(weights["pos_embed"].float(), grid, num_prefix_tokens=1)
    return {**{name: value.float() for name, value in weights.items()}, "pos_embed": place}


def _written(path: Path, model: Any) -> Path:
    """A checkpoint as ``tdm fit`` writes one, weights only, in half precision."""
    kwargs = _kwargs(model.patch_embed.img_size[0], model.embed_dim)
    module = TokenReductionClassifier(MODEL, model_kwargs=kwargs)
    module.model.vit.load_state_dict(model.state_dict())
    trainer = Trainer(accelerator="cpu", barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {name: value.half() for name, value in content["state_dict"].items()}
    torch.save(content, path)
    return path


if __name__ == "__main__":
    run(train)
