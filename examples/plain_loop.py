"""Token reduction and its figures in a plain PyTorch loop, on scikit-learn's digits."""

from itertools import chain

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
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

recorder = DiversityRecorder(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for batch, labels in chain(loader, loader, loader):  # three epochs
    with recorder:  # listens to the pass made inside
        output = model.run(batch)
    loss = sum(model.objective.loss(output, labels, cross_entropy).values())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("diversity after each block:", [round(score.item(), 1) for score in recorder.compute()])
print("MACs:", tdm.flops.count_macs(model), "loss:", round(loss.item(), 3))
