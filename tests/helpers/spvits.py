"""Small SPViTs whose selectors tell patches and images apart, and the definition of their
passes.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tests.helpers.vits import lively


def without_noise(logits, tau=1, hard=False, dim=-1):
    return F.one_hot(logits.argmax(dim), logits.shape[dim]).to(logits.dtype)


def small(vit=None, std=0.6, **kwargs):
    """16 patches, 6 blocks, selectors that tell patches and images apart."""
    torch.manual_seed(3)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 4,
        "num_classes": 5,
        **(vit or {}),
    }
    net = lively(VisionTransformer(**arguments))
    model = tdm.attach(net, tdm.SPViT(**{"layers": (1, 3), "targets": (0.6, 0.3), **kwargs}))
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    for selector in model.eval().strategy.score_predictor:
        balance(model, selector)
    return model


@torch.no_grad()
def balance(model, selector):
    """Shift a selector's logits until it would keep about half of what it sees, if it is asked at
    all.
    """
    seen = []
    hook = selector.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0].diff(dim=2).flatten())
    )
    for image in torch.randn(8, 1, 3, 32, 32, generator=torch.Generator().manual_seed(7)):
        model(image)
    hook.remove()
    for mlp in selector.out_conv if seen else ():
        mlp[-1].bias[0] += torch.cat(seen).median()


def decide(model, keep, stage=None):
    """Selectors that keep, or drop, everything."""
    selectors = model.strategy.score_predictor
    for selector in selectors if stage is None else [selectors[stage]]:
        for mlp in selector.out_conv:
            torch.nn.init.zeros_(mlp[-1].weight)
            with torch.no_grad():
                mlp[-1].bias.copy_(torch.tensor([20.0, -20.0] if keep else [-20.0, 20.0]))
    return model


def masked_pass(model, images, training=False):
    """The definition, one image and token at a time: all tokens stay, dropped ones are seen by
    nobody but themselves.
    """
    vit, strategy, rows = model.vit, model.strategy, []
    for image in images:
        x = vit._pos_embed(vit.patch_embed(image[None]))[0]
        first = vit.num_prefix_tokens
        there, package, members = [1.0] * len(x), [False] * len(x), [1] * len(x)
        for index, block in enumerate(vit.blocks):
            if index in strategy.layers:
                selector = strategy.score_predictor[strategy.layers.index(index)]
                votes, q = selector(x[None, first:], torch.tensor([there[first:]]))
                falls = (votes[0, :, 0] <= votes[0, :, 1]).tolist()
                dropped = [
                    j
                    for j in range(first, len(x))
                    if there[j] and not package[j] and falls[j - first]
                ]
                for j in dropped:
                    there[j], members[j] = 0.0, 0
                if dropped:
                    weights = [
                        q[0, j - first] if strategy.package == "sum" else 1 / len(dropped)
                        for j in dropped
                    ]
                    new = sum(weight * x[j] for weight, j in zip(weights, dropped, strict=True))
                    x, there, package, members = (
                        torch.cat((x, new[None])),
                        [*there, 1.0],
                        [*package, True],
                        [*members, len(dropped)],
                    )
            seen = torch.eye(len(x)).bool() | torch.tensor(there).bool()
            q_, k, v = (
                block.attn.qkv(block.norm1(x))
                .unflatten(-1, (3, block.attn.num_heads, -1))
                .permute(1, 2, 0, 3)
            )
            weights = (
                (q_ @ k.transpose(-2, -1) * block.attn.scale)
                .masked_fill(~seen, -torch.inf)
                .softmax(-1)
            )
            x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
        kept = torch.tensor(there).bool()
        size = torch.tensor(members[first:])[kept[first:]].float()
        rows.append(
            (model.forward_head(vit.norm(x[kept])[None], size[None]), int(kept[first:].sum()))
        )
    return torch.cat([logits for logits, _ in rows]), [count for _, count in rows]
