"""Token reduction and its figures in Lightning Fabric, on scikit-learn's digits."""

from itertools import chain

import timm
import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning.metrics import DiversityRecorder

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=16, shuffle=True)
shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "num_heads": 4, "depth": 4}
model = tdm.attach(
    timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape), tdm.TDM(0.7, layers=(1, 2))
)
fabric = Fabric(accelerator="cpu", devices=1)
recorder = DiversityRecorder(model)
wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
loader = fabric.setup_dataloaders(loader)
for batch, labels in chain(loader, loader, loader):  # three epochs
    with recorder:
        loss = torch.nn.functional.cross_entropy(wrapped(batch), labels)
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
fabric.print(
    "diversity after each block:", [round(score.item(), 1) for score in recorder.compute()]
)
fabric.print("loss:", round(loss.item(), 3))
