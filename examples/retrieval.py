"""Retrieval by DINOv2's class tokens: which other crops are of the same photograph. On trained
weights: python examples/retrieval.py vit_small_patch14_dinov2.lvd142m
"""

import sys

import timm
import torch
from skimage import data
from sklearn.datasets import load_sample_images
from torch.nn.functional import normalize
from torchvision.transforms import v2

import tdm_lightning as tdm
from tdm_lightning.compare import speedup

torch.manual_seed(0), torch.set_grad_enabled(False)
name, *_ = [*sys.argv[1:], "vit_small_patch14_dinov2"]
shape = {"img_size": 224, "init_values": 1.0}  # else an untrained one's blocks add next to nothing
vit = timm.create_model(name, pretrained=bool(sys.argv[1:]), **shape).eval()
model = tdm.attach(vit, tdm.WardTDM(0.8))

photos = [*load_sample_images().images, data.astronaut(), data.cat(), data.coffee(), data.rocket()]
crop = v2.Compose([v2.ToPILImage(), v2.RandomResizedCrop(224, (0.1, 0.4)), v2.ToImage()])
images = torch.stack([crop(photo) for photo in photos for _ in range(4)]) / 255
images = v2.Normalize(vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])(images)
photo = torch.arange(len(photos)).repeat_interleave(4)


def nearest(features):  # the three that are most alike
    alike = normalize(features) @ normalize(features).T
    return alike.fill_diagonal_(-1).topk(3).indices


before, after = nearest(vit(images)), nearest(model(images))
for name, found in (("plain", before), ("reduced", after)):
    print(f"recall at 1, {name}: {(photo[found[:, 0]] == photo).float().mean():.2f}")
same = (before.unsqueeze(2) == after.unsqueeze(1)).any(dim=2).float().mean()
print(f"of three neighbours the same: {same:.2f}")
print(f"{speedup(vit, model, images[:4], rounds=3):.2f} times as fast")
