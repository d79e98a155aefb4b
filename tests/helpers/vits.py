"""What tests of several strategies do with a ViT."""

import torch


@torch.no_grad()
def lively(vit):
    """Weights and positions under which patches differ from each other, as those of a fresh ViT
    hardly do.
    """
    for name, parameter in vit.named_parameters():
        if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
            parameter.normal_(std=0.25)
    vit.pos_embed.normal_(std=0.5)
    return vit


def grouped(model):
    """The optimizer groups that a strategy makes, and the group of each parameter by name."""
    groups = model.objective.param_groups(model, lr=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return groups, {
        names[id(parameter)]: group for group in groups for parameter in group["params"]
    }
