"""Models that are saved, loaded and pushed: the same outputs, and errors that say what is wrong."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.cli import main

TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 7,
}
load = tdm.TokenReducedViT.from_pretrained


def reduced(strategy, name="deit_tiny_patch16_224", **kwargs):
    """A model in which every weight, the strategy's own too, has a value that no initialisation
    gives.
    """
    torch.manual_seed(5)
    model = tdm.attach(timm.create_model(name, **{**TINY, **kwargs}), strategy).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save(model, folder, config=None, **kwargs):
    model.save_pretrained(folder, config=config, **kwargs)


@pytest.fixture
def images():
    torch.manual_seed(6)
    return torch.randn(3, 3, 32, 32)


@pytest.fixture
def shared(tmp_path):
    """A folder with a saved model."""
    save(reduced(tdm.DyViT(0.5, (1, 2))), tmp_path / "shared")
    return tmp_path / "shared"


class Halving(tdm.Strategy):
    """A strategy of one's own, with a weight."""

    def __init__(self, layer: int = 1) -> None:
        super().__init__()
        self.layer = layer

    def bind(self, vit, info):
        self.gain = torch.nn.Parameter(torch.ones(vit.embed_dim))

    def after_block(self, index, tokens):
        return tokens.replace(x=tokens.x * self.gain) if index == self.layer else tokens


# The same model comes back --------------------------------------------------------------------

STRATEGIES = {
    "tdm": lambda: tdm.TDM(0.5, (1, 2), merger=tdm.TokenMerger(density="knn", matching="greedy")),
    "tome": lambda: tdm.ToMe((3, -1.0)),
    "dyvit": lambda: tdm.DyViT(0.5, (1, 2)),
    "psvit": lambda: tdm.PSViT(counts=(12, 8, 4, 0)),
    "adaptive": lambda: tdm.SPViT((1,)),
    "stack": lambda: [tdm.SViTE(), tdm.TDM(0.5, (1,))],
    "own": lambda: Halving(layer=2),
    "none": lambda: tdm.Strategy(),
}


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_reloading_gives_identical_outputs(name, images, tmp_path):
    model = reduced(STRATEGIES[name]())
    save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(images), model(images))
    assert again.strategy.config() == model.strategy.config()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    assert not any(module.training for module in again.modules())
    assert (tmp_path / "strategy.safetensors").exists() == bool(model.strategy.state_dict())


@torch.no_grad()
def test_a_classifier_of_the_strategy_comes_back(images, tmp_path):
    model = reduced(tdm.EvoViT(0.5, class_head=True, layers=(1, 2)), global_pool="avg")
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(images), model(images))


ARCHITECTURES = {
    "eva02_tiny_patch14_224": {},
    "beit_base_patch16_224": {"init_values": 0.3},
    "vit_relpos_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_224": {"global_pool": "avg", "drop_path_rate": 0.1, "dynamic_img_size": True},
    "deit3_small_patch16_224": {"num_classes": 0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_architectures_are_made_again(name, images, tmp_path):
    model = reduced(tdm.TDM(0.5, (1,)), name, **ARCHITECTURES[name])
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(images), model(images))


@torch.no_grad()
def test_timm_loads_the_model_without_the_reduction(images, shared):
    plain = timm.create_model(f"local-dir:{shared}", pretrained=True).eval()
    model = load(shared)
    assert torch.equal(plain(images), model.vit(images))
    assert not torch.equal(plain(images), model(images))


@torch.no_grad()
def test_formats_of_the_weights(images, tmp_path):
    half = reduced(tdm.TDM(0.5, (1,))).to(torch.bfloat16)
    save(half, tmp_path / "half")
    again = load(tmp_path / "half")
    assert {value.dtype for value in again.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(again(images.bfloat16()), half(images.bfloat16()))
    last = reduced(tdm.TDM(0.5, (1,))).to(memory_format=torch.channels_last)
    save(last, tmp_path / "last")
    torch.testing.assert_close(load(tmp_path / "last")(images), last(images))


def test_how_images_are_prepared_comes_along(tmp_path):
    overlay = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}
    model = reduced(tdm.TDM(0.5, (1,)), pretrained_cfg_overlay=overlay, dynamic_img_size=True)
    names = [f"kind {index}" for index in range(7)]
    save(model, tmp_path, config={"label_names": names})
    again = load(tmp_path)
    found = resolve_model_data_config(again)
    assert tuple(found["mean"]) == (0.1, 0.2, 0.3)
    assert found["crop_pct"] == 0.5
    assert tuple(found["input_size"]) == (3, 32, 32)
    assert again.pretrained_cfg["label_names"] == names
    again.save_pretrained(tmp_path / "second")
    assert load(tmp_path / "second").pretrained_cfg["label_names"] == names


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = reduced(tdm.TDM(0.5, (1,))).train()
    model.vit.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    save(model, tmp_path)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_again_replaces_all_but_the_card(images, shared):
    (shared / "README.md").write_text("mine")
    save(reduced(tdm.TDM(0.5, (1,))), shared)
    assert sorted(file.name for file in shared.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (shared / "README.md").read_text() == "mine"
    assert type(load(shared).strategy) is tdm.TDM


# The model card -------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path, images):
    model = reduced(tdm.TDM(0.5, (1,)))
    save(model, tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "tdm-lightning"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license is None
    report = tdm.flops.mac_report(model)
    for words in (
        "deit_tiny_patch16_224",
        "TDM(keep_rate=0.5, layers=[1]",
        f"{report.backbone / 1e9:.2f}",
        "7 classes",
    ):
        assert words in card.text
    assert "Not stated yet" in card.text
    (code,) = [part.split("```")[0] for part in card.text.split("```python\n")[1:]]
    assert len(code.strip().splitlines()) <= 6
    picture = __import__("PIL.Image").Image.new("RGB", (40, 50), "red")
    names = {"image": picture}
    exec(code.replace("USER/NAME", str(tmp_path)), names)
    assert names["logits"].shape == (1, 7)


def test_the_licence_is_the_users(tmp_path):
    save(reduced(tdm.SPViT((1,))), tmp_path, license="cc-by-4.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "cc-by-4.0" in card.text
    assert "depends on the image" in card.text


# The hub --------------------------------------------------------------------------------------


class Hub:
    """What is asked of the hub's client; keeps a copy of what is uploaded."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, **settings):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **settings):
        self.calls.append(("upload", repo_id, settings["commit_message"]))
        shutil.copytree(folder_path, self.folder)
        return f"https://huggingface.co/{repo_id}/commit/1"


@torch.no_grad()
def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path, images, monkeypatch):
    hub = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(tdm.hub, "HfApi", hub)
    model = reduced(tdm.DyViT(0.5, (1, 2)))
    address = model.push_to_hub("me/fast-deit", private=True, license="mit", commit_message="First")
    assert address == "https://huggingface.co/me/fast-deit/commit/1"
    assert hub.calls == [("create", "me/fast-deit", True), ("upload", "me/fast-deit", "First")]
    files = {"README.md", "config.json", "model.safetensors", "strategy.safetensors"}
    assert {file.name for file in hub.folder.iterdir()} == files
    assert 'from_pretrained("me/fast-deit")' in (hub.folder / "README.md").read_text()
    assert huggingface_hub.ModelCard.load(hub.folder / "README.md").data.license == "mit"
    assert torch.equal(load(hub.folder)(images), model(images))


def in_cache(shared, cache):
    """A download of the repository ``me/fast-deit``, laid out as huggingface_hub keeps it."""
    repository = cache / "models--me--fast-deit"
    shutil.copytree(shared, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return cache


@torch.no_grad()
def test_a_downloaded_repository_loads_without_a_network(shared, tmp_path, images, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load("me/fast-deit", cache_dir=in_cache(shared, tmp_path / "cache"))
    assert torch.equal(again(images), load(shared)(images))


@pytest.mark.parametrize("name", ["me/fast-deit", "no/such/folder/anywhere", "two words"])
def test_a_repository_out_of_reach(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=(
            f"'{name}' is neither a folder nor a repository(?s:.*)Check the name(?s:.*)hf auth"
            " login"
        ),
    ):
        load(name, cache_dir=tmp_path)


# Files that do not fit ------------------------------------------------------------------------


def changed(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def test_a_config_of_a_newer_version(shared):
    changed(
        shared,
        lambda config: config["tdm_lightning"].update(format=2, version="9.1.0", new_thing=[1]),
    )
    with pytest.raises(
        ValueError,
        match=r"written by tdm-lightning 9\.1\.0 in format 2.*reads up to format 1: pip install -",
    ):
        load(shared)


@pytest.mark.parametrize("key", ["architecture", "pretrained_cfg", "num_classes"])
def test_a_config_without_an_entry(shared, key):
    with pytest.raises(ValueError, match=f"incomplete: it has no '{key}'"):
        load(changed(shared, lambda config: config.pop(key)))


def test_a_config_without_a_strategy(shared):
    with pytest.raises(ValueError, match="incomplete: it has no 'tdm_lightning.strategy'"):
        load(changed(shared, lambda config: config["tdm_lightning"].pop("strategy")))


def test_a_model_of_timms(shared):
    with pytest.raises(
        ValueError,
        match="holds no reduced model: its config.json has no 'tdm_lightning'.*timm.create_model",
    ):
        load(changed(shared, lambda config: config.pop("tdm_lightning")))


def test_a_strategy_that_is_not_imported(shared):
    def rename(config):
        config["tdm_lightning"]["strategy"]["class_path"] = "their.package.Pruner"

    with pytest.raises(
        ValueError,
        match=r"'their\.package\.Pruner' is not a known Strategy.*import its module before",
    ):
        load(changed(shared, rename))


def test_a_strategy_with_an_argument_that_is_not_known(shared):
    with pytest.raises(ValueError, match="the strategy of .* cannot be built: .*shiny"):
        load(
            changed(
                shared,
                lambda config: config["tdm_lightning"]["strategy"]["init_args"].update(shiny=1),
            )
        )


def test_an_architecture_that_timm_does_not_have(shared):
    with pytest.raises(ValueError, match=r"cannot be made: timm .* has no model 'vit_of_tomorrow'"):
        load(changed(shared, lambda config: config.update(architecture="vit_of_tomorrow")))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("model.safetensors", "blocks.1.mlp.fc1.weight"),
        ("strategy.safetensors", "score_predictor.0.in_conv.1.weight"),
    ],
)
def test_a_file_with_a_missing_key(shared, file, key):
    weights = load_file(shared / file)
    del weights[key]
    save_file(weights, shared / file)
    with pytest.raises(
        ValueError, match=rf"{file} of .* does not fit(?s:.*)Missing key\(s\).*{key}"
    ):
        load(shared)


@pytest.mark.parametrize("file", ["model.safetensors", "strategy.safetensors"])
def test_a_file_that_is_missing_or_cut_off(shared, file):
    (shared / file).write_bytes((shared / file).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file} of .* is missing or incomplete"):
        load(shared)
    (shared / file).unlink()
    with pytest.raises(ValueError, match=f"{file} of .* is missing or incomplete"):
        load(shared)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "holds a list"), (None, "has no config.json")],
)
def test_a_config_that_is_none(shared, content, message):
    (shared / "config.json").unlink()
    if content is not None:
        (shared / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(shared)


# Models that could not be made again ----------------------------------------------------------


def test_a_model_that_timm_did_not_make(tmp_path):
    with pytest.raises(ValueError, match="was not made by timm.create_model"):
        tdm.attach(VisionTransformer(**TINY), tdm.TDM(0.5, (1,))).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def test_arguments_that_the_model_does_not_know_any_more(tmp_path, images):
    model = reduced(tdm.TDM(0.5, (1,)))
    model.vit._model_args = {}  # as older releases of timm leave it
    with pytest.raises(
        ValueError,
        match=r"nothing was written: .*say what it was created with: config=\{'model_args'",
    ):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", config={"model_args": {**TINY}})
    assert torch.equal(load(tmp_path / "new")(images), model(images))


def test_a_change_that_no_shape_shows(tmp_path):
    model = reduced(tdm.TDM(0.5, (1,)))
    model.vit.blocks[2].mlp.act = torch.nn.ReLU()
    with pytest.raises(ValueError, match="All shapes agree, but the outputs do not"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What ``tdm fit`` made ------------------------------------------------------------------------


@torch.no_grad()
def test_a_checkpoint_is_shared_by_the_command(tmp_path, images, capsys):
    from lightning.pytorch import Trainer

    arguments = {key: value for key, value in TINY.items() if key != "num_classes"}
    names = [f"kind {index}" for index in range(7)]
    module = tdm.TokenReductionClassifier(
        "deit_tiny_patch16_224",
        tdm.DyViT(0.5, (1, 2)),
        num_classes=7,
        label_names=names,
        model_kwargs=arguments,
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    out = tmp_path / "shared"
    main(["export", f"--weights={tmp_path / 'last.ckpt'}", "--format=hub", f"--out={out}"])
    again = load(out)
    assert torch.equal(again(images), module.eval()(images))
    assert again.pretrained_cfg["label_names"] == names
    assert f"hf upload USER/NAME {out}" in capsys.readouterr().out
