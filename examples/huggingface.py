"""Token reduction and its figures in Hugging Face's Trainer, on scikit-learn's digits."""

import timm
import torch
from sklearn.datasets import load_digits
from tdm_lightning.callbacks.huggingface import TokenReductionCallback
from transformers import Trainer, TrainingArguments

import tdm_lightning as tdm


class Classifier(torch.nn.Module):  # what the Trainer expects of a model
    def __init__(self):
        super().__init__()
        shape = {
            "img_size": 8,
            "patch_size": 2,
            "in_chans": 1,
            "embed_dim": 64,
            "num_heads": 4,
            "depth": 4,
            "num_classes": 10,
        }
        self.vit = tdm.attach(
            timm.create_model("vit_tiny_patch16_224", **shape), tdm.TDM(0.7, layers=(1, 2))
        )

    def forward(self, pixel_values, labels):
        output = self.vit.run(pixel_values)
        terms = self.vit.objective.loss(output, labels, torch.nn.functional.cross_entropy)
        return {"loss": sum(terms.values()), "logits": output.logits}


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
args = TrainingArguments("runs/hf", **settings)
trainer = Trainer(
    Classifier(),
    args,
    train_dataset=data,
    eval_dataset=data[:200],
    callbacks=[TokenReductionCallback()],
)
trainer.train()
print(trainer.evaluate())  # eval_diversity/block_00 …, eval_flops/gmacs, eval_tokens/block_00 …
