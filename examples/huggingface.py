"""transformers' own ViT, reduced in its place, in its own Trainer; on scikit-learn's digits."""

import torch
from sklearn.datasets import load_digits
from tdm_lightning.callbacks.huggingface import TokenReductionCallback
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import tdm_lightning as tdm

shape = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
model = ViTForImageClassification(ViTConfig(**shape, num_labels=10))
tdm.attach(model, tdm.TDM(0.7, layers=(1, 2)))  # the same model, with fewer tokens inside

pixels = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
data = [
    {"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, load_digits().target, strict=True)
]
settings = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "report_to": [],
}
trainer = Trainer(
    model,
    TrainingArguments("runs/hf", **settings),
    train_dataset=data,
    eval_dataset=data[:200],
    callbacks=[TokenReductionCallback()],
)
trainer.train()
print(trainer.evaluate())  # eval_diversity/block_00 …, eval_flops/gmacs, eval_tokens/block_00 …
