"""Encoders of transformers decide, and see, as timm's of the same weights do."""

import itertools

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tdm_lightning as tdm
from tests.vit.test_huggingface import SHAPE

transformers = pytest.importorskip("transformers", minversion="5.20")
STRATEGIES = {
    "ward": lambda: tdm.WardTDM(0.6, (0, 2)),
    "tdm": lambda: tdm.TDM(0.7, (1, 2)),
    "evit": lambda: tdm.EViT(0.7, (1, 2)),
    "tome": lambda: tdm.ToMe(8),
}
TIMM = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
TIMM |= {"mlp_ratio": 2, "num_classes": 0}

#: transformers' names in timm's words.
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "shared_position_bias.relative": "rel_pos_bias.relative",
    "relative_position_bias.relative": "attn.relative",
    "model.layer": "layer",
    "layer.": "blocks.",
    "layers.": "blocks.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "pooler.norm": "fc_norm",
    "attention.o_proj": "attn.proj",
    "lambda_": "gamma_",
    "layer_scale1.lambda1": "gamma_1",
    "layer_scale2.lambda1": "gamma_2",
    "up_proj": "fc1",
    "down_proj": "fc2",
}


def vit():
    model = transformers.ViTModel(transformers.ViTConfig(**SHAPE), add_pooling_layer=False)
    return model, VisionTransformer(**TIMM)


def beit(shared):
    which = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    model = transformers.BeitModel(transformers.BeitConfig(**SHAPE, **which))
    twin = Beit(**TIMM, use_abs_pos_emb=False, use_rel_pos_bias=not shared, init_values=0.1,
                use_shared_rel_pos_bias=shared)  # fmt: skip
    return model, twin


def dinov3():
    config = transformers.DINOv3ViTConfig(**SHAPE, num_register_tokens=2)
    twin = Eva(**TIMM, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3",
               rope_temperature=100, num_reg_tokens=2, init_values=1e-5, use_fc_norm=False,
               global_pool="token", rope_rotate_half=True, qkv_fused=True)  # fmt: skip
    return transformers.DINOv3ViTModel(config), twin


PAIRS = {
    "vit": vit,
    "beit": lambda: beit(shared=False),
    "beit-shared": lambda: beit(shared=True),
    "dinov3": dinov3,
}


def pair(name):
    """A model of transformers with random weights, and timm's with the same."""
    torch.manual_seed(0)
    model, twin = PAIRS[name]()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    theirs = {}
    for key, value in model.state_dict().items():
        for mine, other in NAMES.items():
            key = key.replace(mine, other)
        theirs[key] = value
    for index in range(SHAPE["num_hidden_layers"]):
        name = f"blocks.{index}.attn"
        of = {f"{part}.{kind}": theirs.get(f"blocks.{index}.attention.{part}_proj.{kind}")
              for part in "qkv" for kind in ("weight", "bias")}  # fmt: skip
        theirs[f"{name}.qkv.weight"] = torch.cat([of[f"{part}.weight"] for part in "qkv"])
        if of["k.bias"] is not None:
            theirs[f"{name}.qkv.bias"] = torch.cat([of[f"{part}.bias"] for part in "qkv"])
        theirs |= {f"{name}.{part}_bias": of[f"{part}.bias"] for part in "qv"}
    weights = twin.state_dict()
    found = {key: value for key, value in theirs.items() if key in weights}
    # in BEiT and DINOv3 a key has no bias, and timm's BEiT has zeros there
    assert all(key.endswith("attn.k_bias") for key in weights.keys() - found.keys())
    twin.load_state_dict({**weights, **found})
    for norm in (m for m in twin.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = model.config.layer_norm_eps
    return model.eval(), twin.eval()


@pytest.mark.parametrize(
    ("which", "name"), [*itertools.product(PAIRS, STRATEGIES), ("vit", "mctf")]
)
@torch.no_grad()
def test_it_decides_as_timm_does(which, name):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model, twin = pair(which)
    make = STRATEGIES.get(name, lambda: tdm.MCTF(8))  # that takes plain blocks
    twin = tdm.attach(twin, make()).eval()
    patches, prefix = twin.forward_intermediates(
        images, [3], True, norm=True, output_fmt="NLC", intermediates_only=True
    )[0]
    tdm.attach(model, make())
    found = model(pixel_values=images).last_hidden_state
    count = prefix.shape[1]
    torch.testing.assert_close(found[:, count:], patches, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, :count], prefix, atol=1e-4, rtol=1e-4)
    trace = tdm.find_vit(model).trace(images)[1]
    for mine, theirs in zip(trace.layers, twin.trace(images)[1].layers, strict=True):
        assert torch.equal(mine.assignment, theirs.assignment)
