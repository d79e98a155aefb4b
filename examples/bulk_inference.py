"""Predictions for a whole data set by several processes, from a reduced model that was exported:
each loads the file once, and needs torch alone. On scikit-learn's digits.

On a cluster each node takes its part, ``dataset.shard(nodes, node)``; ``rank`` picks the device.
"""

import time
from functools import cache

import timm
import torch
from datasets import Dataset
from sklearn.datasets import load_digits

import tdm_lightning as tdm
from tdm_lightning.export import export_program


def make_model(file):
    """Train a small ViT for an epoch, and export it with its token reduction."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(load_digits().target)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=4, **shape)
    model = tdm.attach(vit, tdm.TDM(0.7, layers=(1, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in torch.randperm(len(images)).split(16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    export_program(model.eval(), file)
    with torch.no_grad():
        return model(images).argmax(dim=1)


@cache
def load(file, device):
    torch.set_num_threads(1)  # processes share the cores
    return torch.export.load(file).module().to(device)


def predict(rows, rank, file):
    count = torch.cuda.device_count()
    device = f"cuda:{rank % count}" if count else "cpu"
    images = torch.tensor(rows["image"], dtype=torch.float32).unsqueeze(1) / 8 - 1
    with torch.no_grad():
        logits = load(file, device)(images.to(device))
    return {"label": logits.argmax(dim=1).tolist(), "rank": [rank] * len(images)}


if __name__ == "__main__":
    expected = make_model("model.pt2")
    dataset = Dataset.from_dict({"image": load_digits().images.tolist()})
    settings = {"batched": True, "batch_size": 128, "with_rank": True, "num_proc": 2}
    begun = time.perf_counter()
    found = dataset.map(predict, fn_kwargs={"file": "model.pt2"}, **settings)
    print(f"{len(found) / (time.perf_counter() - begun):.0f} images/s")
    found.select_columns(["label", "rank"]).to_parquet("predictions.parquet")
    print(f"agreement: {(torch.tensor(found['label']) == expected).float().mean():.4f}")
