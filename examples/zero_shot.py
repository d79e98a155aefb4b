"""Zero-shot classification by a CLIP of open_clip: what is on crops of photographs. On trained
weights: python examples/zero_shot.py ViT-B-16 openai
"""

import copy
import sys

import open_clip
import torch
from skimage import data
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

import tdm_lightning as tdm
from tdm_lightning.compare import speedup

torch.manual_seed(0), torch.set_grad_enabled(False)
name, pretrained = sys.argv[1:] or ("ViT-S-16", None)
plain, _, prepare = open_clip.create_model_and_transforms(name, pretrained)
words = ["a temple", "a flower", "an astronaut", "a cat", "coffee", "a rocket"]
tokens = open_clip.get_tokenizer(name)([f"a photo of {word}" for word in words])
texts = plain.eval().encode_text(tokens, normalize=True)

photos = [*load_sample_images().images, data.astronaut(), data.cat(), data.coffee(), data.rocket()]
crop = v2.Compose([v2.ToPILImage(), v2.RandomResizedCrop(300, (0.1, 0.4)), prepare])
images = torch.stack([crop(photo) for _ in range(4) for photo in photos])
label = torch.arange(6).repeat(4)
if not pretrained:  # solve for the last projection on other crops
    features = plain.encode_image(torch.stack([crop(photo) for _ in range(4) for photo in photos]))
    fit = torch.linalg.pinv(features, rtol=1e-3) @ texts.repeat(4, 1)
    plain.visual.proj.copy_(plain.visual.proj @ fit)
clip = tdm.attach(copy.deepcopy(plain), tdm.WardTDM(0.7))  # its image tower

before, after = (model.encode_image(images, normalize=True) for model in (plain, clip))
chosen, again = (before @ texts.T).argmax(1), (after @ texts.T).argmax(1)
right, kept = ((found == label).float().mean() for found in (chosen, again))
print(f"right: {right:.2f}, reduced {kept:.2f}; alike: {(chosen == again).float().mean():.2f}")
print(f"{speedup(plain.encode_image, clip.encode_image, images[:4], rounds=3):.2f} times as fast")
