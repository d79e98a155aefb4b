"""A CLIP-style model whose image tower is reduced in its place, on scikit-learn's digits and their
names.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import tdm_lightning as tdm

torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(load_digits().target)
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
letters = torch.tensor(
    [[ord(letter) - ord("a") for letter in name.ljust(5, "{")] for name in names]
)

shape = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 64,
    "num_heads": 4,
    "depth": 4,
    "num_classes": 0,
}
visual = nn.Sequential()
visual.trunk, visual.head = timm.create_model("vit_tiny_patch16_224", **shape), nn.Linear(64, 32)
text = nn.Sequential(nn.Embedding(27, 32), nn.Flatten(), nn.Linear(5 * 32, 32))
clip = tdm.attach(
    nn.ModuleDict({"visual": visual, "text": text}),
    tdm.TDM(0.7, layers=(1, 2)),
    path="visual.trunk",
)
optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
for batch in torch.randperm(len(images))[:1600].split(
    16
):  # image and name belong together where the labels agree
    similarity = 20 * normalize(visual(images[batch])) @ normalize(text(letters[labels[batch]])).T
    pairs = normalize((labels[batch, None] == labels[batch]).float(), p=1)
    loss = (cross_entropy(similarity, pairs) + cross_entropy(similarity.T, pairs)) / 2
    loss.backward(), optimizer.step(), optimizer.zero_grad()
hits = (visual(images) @ normalize(text(letters)).T).argmax(dim=1) == labels
print(
    "named right:", round(hits.float().mean().item(), 2), "trunk:", type(clip.visual.trunk).__name__
)
