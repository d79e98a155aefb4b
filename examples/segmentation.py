"""Segmentation on a reduced ViT: each patch gets the feature of its token, and gradients flow back
through the merging.
"""

import timm
import torch
from sklearn.datasets import load_sample_image
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, pixel_shuffle

import tdm_lightning as tdm

torch.manual_seed(0)
photo = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1).unsqueeze(0) / 255
images = interpolate(photo, (96, 144), mode="area")
petals = (images[:, :1] > 1.3 * images[:, 1:2]).float()  # what is redder than green

shape = {
    "img_size": (96, 144),
    "patch_size": 8,
    "embed_dim": 64,
    "num_heads": 4,
    "depth": 4,
    "num_classes": 0,
}
model = tdm.attach(timm.create_model("vit_tiny_patch16_224", **shape), tdm.TDM(0.7, layers=(1, 2)))
head = torch.nn.Conv2d(model.embed_dim, 8 * 8, kernel_size=1)  # one logit for each pixel of a patch

optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
for _ in range(40):
    (features,) = model.forward_intermediates(
        images, indices=1, norm=True, intermediates_only=True
    )  # 1×64×12×18
    logits = pixel_shuffle(head(features), 8)
    loss = binary_cross_entropy_with_logits(logits, petals)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
both, either = (logits > 0) & (petals > 0), (logits > 0) | (petals > 0)
print(
    "tokens:",
    model.trace(images)[1].token_counts,
    "IoU:",
    round((both.sum() / either.sum()).item(), 2),
)
