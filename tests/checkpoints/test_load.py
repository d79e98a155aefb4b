"""Official checkpoints: read safely, fitted wholly or not at all."""

import argparse
import os
import pathlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_official


def vit(img_size=32, num_classes=5, **kwargs):
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, **kwargs}
    return VisionTransformer(img_size=img_size, num_classes=num_classes, **arguments).eval()


def strange_weights(model):
    """Weights of the model's names that no initialisation gives."""
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def official_file(weights, ema):
    """What DeiT's training script saves."""
    return {
        "model": OrderedDict(weights),
        "model_ema": ema,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": np.float64(1e-3)}],
        },
        "lr_scheduler": {"base_values": [1e-3], "noise_range_t": None},
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "epoch": 299,
        "args": argparse.Namespace(
            lr=5e-4,
            model="deit",
            keep_rate=(0.7,),
            output_dir=pathlib.PosixPath("out"),
            dist_eval=True,
        ),
    }


class Evil:
    """Its pickle creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("which", ["model", "model_ema"])
@pytest.mark.parametrize("legacy", [False, True])
def test_official_file_loads_with_its_namespace(tmp_path, which, legacy):
    model = vit()
    stored = {"model": strange_weights(model), "model_ema": strange_weights(model)}
    torch.save(
        official_file(**{"weights": stored["model"], "ema": stored["model_ema"]}),
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    report = load_official(model, tmp_path / "w.pth", which=which)
    assert same(model, stored[which])
    assert report == tdm.checkpoints.LoadReport("deit")


def test_all_containers_give_the_same_weights(tmp_path):
    weights = strange_weights(vit())
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    for source in (
        weights,
        {"model": weights},
        wrapped,
        {"model": wrapped},
        tmp_path / "w.safetensors",
        str(tmp_path / "w.pt"),
    ):
        model = vit()
        load_official(model, source)
        assert same(model, weights)


def test_reduced_model_loads_into_its_vit_and_the_mapping_is_left_alone():
    model = tdm.attach(vit(), tdm.TDM(layers=(1, 2)))
    weights = strange_weights(model.vit)
    before = dict(weights)
    load_official(model, weights)
    assert same(model.vit, weights)
    assert weights.keys() == before.keys()
    assert all(weights[name] is before[name] for name in weights)


def test_official_evit_weights_load(golden):
    facts, tensors = golden("evit_a")
    stored = {
        name.removeprefix("state_dict."): value
        for name, value in tensors.items()
        if name.startswith("state_dict.")
    }
    kwargs = {
        name: value for name, value in facts["constructor"].items() if name != "layernorm_eps"
    }
    model = tdm.attach(VisionTransformer(**kwargs), tdm.EViT())
    load_official(model, {"model": stored})
    assert same(model.vit, stored)


def test_layer_scale_of_deit_iii_is_renamed():
    model = vit(init_values=1e-5, no_embed_class=True)
    weights = strange_weights(model)
    named = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in weights.items()
    }
    assert "blocks.0.gamma_1" in named
    load_official(model, named)
    assert same(model, weights)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}],
)
@pytest.mark.parametrize("img_size", [48, (24, 40)])
def test_position_grid_is_interpolated(kwargs, img_size):
    small, large = vit(**kwargs), vit(img_size=img_size, **kwargs)
    weights = strange_weights(small)
    report = load_official(large, weights)
    grid = large.patch_embed.grid_size
    assert report.interpolated == ((4, 4), grid)
    prefix = large.pos_embed.shape[1] - grid[0] * grid[1]
    assert torch.equal(large.pos_embed[:, :prefix], weights["pos_embed"][:, :prefix])
    wanted = resample_abs_pos_embed(
        weights["pos_embed"], list(grid), [4, 4], num_prefix_tokens=prefix
    )
    torch.testing.assert_close(large.pos_embed, wanted)
    others = {name: value for name, value in large.state_dict().items() if name != "pos_embed"}
    assert all(torch.equal(value, weights[name]) for name, value in others.items())


def test_a_smooth_position_field_survives_interpolation():
    """An independent check of the geometry: a field linear in row and column stays linear, row
    before column.
    """
    small, large = vit(), vit(img_size=64)
    rows = torch.linspace(-1, 1, 9)[1::2]
    fine = torch.linspace(-1, 1, 17)[1::2]
    weights = small.state_dict()
    weights["pos_embed"] = torch.zeros(1, 17, 32)
    weights["pos_embed"][0, 1:, 0] = rows.repeat_interleave(4)
    weights["pos_embed"][0, 1:, 1] = rows.repeat(4)
    load_official(large, weights)
    inner = large.pos_embed[0, 1:].unflatten(0, (8, 8))[2:6, 2:6]
    torch.testing.assert_close(inner[..., 0], fine[2:6, None].expand(4, 4), atol=0.05, rtol=0)
    torch.testing.assert_close(inner[..., 1], fine[None, 2:6].expand(4, 4), atol=0.05, rtol=0)


def test_everything_that_does_not_fit_is_named_at_once_and_nothing_is_loaded():
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = strange_weights(model)
    weights["blocks.1.mlp.fc1.weight"] = torch.zeros(7, 32)
    del weights["blocks.2.norm1.bias"]
    weights["blocks.3.surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        load_official(model, weights)
    message = str(caught.value)
    assert "blocks.1.mlp.fc1.weight (7×32 instead of 128×32)" in message
    assert "Missing from the file: blocks.2.norm1.bias." in message
    assert "Not in the model: blocks.3.surprise." in message
    assert "skip_head" not in message
    assert same(model, before)


@pytest.mark.parametrize(
    "name", ["cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "head.bias"]
)
@pytest.mark.parametrize("harm", ["shape", "missing", "extra"])
def test_a_single_flaw_is_named(name, harm):
    model = tdm.attach(vit(), tdm.EViT(layers=(1,)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = strange_weights(model.vit)
    if harm == "shape":
        weights[name] = torch.zeros(*weights[name].shape[:-1], weights[name].shape[-1] + 1)
    elif (
        harm == "missing" and name != "patch_embed.proj.weight"
    ):  # without that one no layout is recognised
        del weights[name]
    else:
        name = f"{name}.more"
        weights[name] = torch.zeros(2)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_official(model, weights)
    assert same(model, before)


@pytest.mark.parametrize("kwargs", [{"embed_dim": 48}, {"depth": 3}, {"patch_size": 4}])
def test_a_checkpoint_of_another_model_says_so(kwargs):
    with pytest.raises(
        ValueError,
        match=(
            "It holds another model: .* blocks, width .*; this one has 4 blocks, width 32,"
            " patches 8×8"
        ),
    ):
        load_official(vit(), vit(**kwargs).state_dict())


def test_a_checkpoint_of_another_family_says_so():
    with pytest.raises(ValueError, match="not of a known layout.*conv1.weight"):
        load_official(vit(), {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)})


def test_another_class_count_is_an_error_unless_the_head_is_skipped():
    weights = strange_weights(vit(num_classes=7))
    model = vit(num_classes=5)
    own = model.head.weight.clone()
    with pytest.raises(
        ValueError, match=r"head.weight \(7×32 instead of 5×32\)[\s\S]*skip_head=True"
    ):
        load_official(model, weights)
    report = load_official(model, weights, skip_head=True)
    assert report.untouched == ("head.bias", "head.weight")
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    headless = vit(num_classes=0)
    assert load_official(headless, weights, skip_head=True).untouched == ()
    assert torch.equal(headless.norm.weight, weights["norm.weight"])


class Scored(tdm.EViT):
    """A strategy with a layer of its own."""

    def bind(self, vit, info):
        super().bind(vit, info)
        self.score = torch.nn.Linear(2, 1)


def test_a_strategys_own_layers_stay_when_the_file_has_none():
    model = tdm.attach(vit(), Scored(layers=(1,)))
    weights = strange_weights(model.vit)
    assert load_official(model, weights).untouched == (
        "strategy.score.bias",
        "strategy.score.weight",
    )
    assert same(model.vit, weights)


def test_a_strategys_own_layers_load_by_name_and_not_in_part():
    model = tdm.attach(vit(), Scored(layers=(1,)))
    weights = strange_weights(model.vit) | {"strategy.score.weight": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"Missing from the file: strategy\.score\.bias"):
        load_official(model, weights)
    weights["strategy.score.bias"] = torch.full((1,), 2.0)
    load_official(model, weights)
    assert model.strategy.score.bias.item() == 2
    with pytest.raises(ValueError, match="attach that method before loading"):
        load_official(vit(), weights)


@pytest.mark.parametrize("where", ["args", "model", "top"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_never_runs(tmp_path, where, legacy):
    victim = tmp_path / "ran"
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = {"model": strange_weights(model), "args": argparse.Namespace(lr=1)}
    if where == "args":
        content["args"].lr = Evil(victim)
    elif where == "model":
        content["model"]["norm.weight"] = Evil(victim)
    else:
        content = Evil(victim)
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"was not loaded.*mkdir.*could run code"):
        load_official(model, tmp_path / "evil.pth")
    assert not victim.exists()
    assert same(model, before)


def test_the_allow_list_does_not_leak(tmp_path):
    load_official(
        vit(), _saved(tmp_path, {"model": strange_weights(vit()), "args": argparse.Namespace(a=1)})
    )
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def _saved(folder, content, name="w.pth"):
    torch.save(content, folder / name)
    return folder / name


def test_unreadable_and_missing_files(tmp_path):
    (tmp_path / "cut.pth").write_bytes(_saved(tmp_path, strange_weights(vit())).read_bytes()[:2000])
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    for name in ("cut.pth", "cut.safetensors", "empty.pth", "text.pth"):
        with pytest.raises(ValueError, match=name):
            load_official(vit(), tmp_path / name)
    for name in ("nowhere.pth", "nowhere.safetensors"):
        with pytest.raises(FileNotFoundError):
            load_official(vit(), tmp_path / name)


def test_contents_that_are_no_weights(tmp_path):
    with pytest.raises(ValueError, match="holds a list"):
        load_official(vit(), _saved(tmp_path, [1, 2]))
    with pytest.raises(
        ValueError, match=r"no weights under 'model_ema'; its keys are model, epoch"
    ):
        load_official(vit(), {"model": strange_weights(vit()), "epoch": 3}, which="model_ema")
    with pytest.raises(ValueError, match="no tensors: epoch"):
        load_official(vit(), {**strange_weights(vit()), "epoch": 3})
    with pytest.raises(ValueError, match="which must be"):
        load_official(vit(), {}, which="teacher")
    with pytest.raises(TypeError, match="a path or a state dict"):
        load_official(vit(), 3)
    with pytest.raises(TypeError, match="Vision Transformer"):
        load_official(torch.nn.Linear(2, 2), {})
