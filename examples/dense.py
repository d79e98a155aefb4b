"""Depth and segmentation heads on a reduced tower: they find the features of all patches. On
trained weights: python examples/dense.py depth-anything/Depth-Anything-V2-Small-hf
"""

import copy
import sys

import torch
from sklearn.datasets import load_sample_image
from torch.nn.functional import avg_pool2d
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

import tdm_lightning as tdm
from tdm_lightning.compare import speedup

torch.manual_seed(0), torch.set_grad_enabled(False)
model, *name = DepthAnythingForDepthEstimation, *sys.argv[1:]
plain = model.from_pretrained(*name) if name else model(DepthAnythingConfig())
reduced = tdm.attach(copy.deepcopy(plain.eval()), tdm.WardTDM(0.7))  # its DINOv2
sample = load_sample_image("flower.jpg")[50:386, 150:486]
photo = torch.tensor(sample).movedim(2, 0).unsqueeze(0) / 127.5 - 1

depth, again = (model(photo).predicted_depth.flatten() for model in (plain, reduced))
print(f"depth, correlation: {torch.corrcoef(torch.stack((depth, again)))[0, 1]:.3f}")

petals = (photo[:, :1] + 1 > 1.3 * (photo[:, 1:2] + 1)).float()  # what is redder than green
share = avg_pool2d(petals, 14).flatten()  # of each patch
features, dense = (model.backbone(photo).feature_maps[-1][0, 1:] for model in (plain, reduced))
head = torch.linalg.pinv(features, rtol=1e-2) @ share  # linear, fitted to the plain features
truth, mask, same = share > 0.5, features @ head > 0.5, dense @ head > 0.5
for name, found, wanted in (("plain", mask, truth), ("reduced", same, truth), ("both", mask, same)):
    print(f"petals, IoU, {name}: {(found & wanted).sum() / (found | wanted).sum():.2f}")
for name, old, new in (("all", plain, reduced), ("backbone", plain.backbone, reduced.backbone)):
    print(f"{name}: {speedup(old, new, photo, rounds=3):.2f} times as fast")
