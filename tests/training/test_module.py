"""The LightningModule: recipe, optimizer groups, checkpoints, subclassing."""

import pytest
import torch
from lightning.pytorch import Trainer
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning import TokenReductionClassifier

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 12}
CLASSES = 5


def classifier(**changes):
    settings = {
        "model": "deit_tiny_patch16_224",
        "model_kwargs": KWARGS,
        "num_classes": CLASSES,
        "strategy": tdm.TDM(keep_rate=0.7),
        "warmup_epochs": 0,
    }
    return TokenReductionClassifier(**{**settings, **changes})


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(11, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(11) % CLASSES), batch_size=4)


def trainer(tmp_path, **changes):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**settings, **changes})


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"mixup": 0.0, "cutmix": 0.0},
        {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0},
        {"train_in_eval_mode": True},
        {"layer_decay": 0.75},
        {"strategy": None},
        {"strategy": tdm.EViT(merger=tdm.TokenMerger())},
    ],
    ids=[
        "deit",
        "no mixing",
        "plain cross entropy",
        "eval mode",
        "layer decay",
        "plain model",
        "evit+tdm",
    ],
)
def test_fit_and_test(tmp_path, loader, recipe):
    module = classifier(**recipe)
    before = {name: value.clone() for name, value in module.model.vit.named_parameters()}
    run = trainer(tmp_path)
    run.fit(module, loader, loader)
    assert {"train/loss", "val/loss", "val/top1", "val/top5"} <= set(run.callback_metrics)
    moved = [
        name
        for name, value in module.model.vit.named_parameters()
        if not torch.equal(value, before[name])
    ]
    assert len(moved) > len(before) / 2
    assert "test/top1" in run.test(module, loader, verbose=False)[0]


def test_eval_mode_reaches_the_vit_but_not_the_strategy(tmp_path, loader):
    modes = []

    class Watching(TokenReductionClassifier):
        def training_step(self, batch, batch_idx):
            modes.append((self.model.vit.training, self.model.strategy.training))
            return super().training_step(batch, batch_idx)

    module = Watching(
        "deit_tiny_patch16_224",
        tdm.TDM(),
        CLASSES,
        model_kwargs=KWARGS,
        warmup_epochs=0,
        train_in_eval_mode=True,
    )
    trainer(tmp_path, max_epochs=2).fit(module, loader, loader)
    assert set(modes) == {(False, True)}


def test_schedule_warms_up_then_follows_a_cosine(tmp_path, loader):
    rates = []

    class Watching(TokenReductionClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])

    module = Watching(
        "deit_tiny_patch16_224",
        None,
        CLASSES,
        model_kwargs=KWARGS,
        lr=1e-3,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=2,
    )
    trainer(tmp_path, max_epochs=6).fit(module, loader)
    assert rates[0] == pytest.approx(1e-6)
    peak = rates.index(max(rates))
    assert peak == 6  # two epochs of three steps
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 1e-5 <= rates[-1] < 1e-4


def test_weights_decay_but_not_biases_norms_and_positions():
    module = classifier()
    module.trainer = Trainer(max_steps=10, logger=False, accelerator="cpu")
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(parameter): name for name, parameter in module.model.vit.named_parameters()}
    free = {
        names[id(p)]
        for group in optimizer.param_groups
        if not group["weight_decay"]
        for p in group["params"]
    }
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= free
    assert not any(name.endswith("attn.qkv.weight") or name == "head.weight" for name in free)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_layer_decay_scales_the_learning_rate_by_depth(tmp_path, loader):
    module = classifier(layer_decay=0.5, lr=1e-3, min_lr=0.0)
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    run.fit(module, loader)
    scales = {group["lr_scale"] for group in run.optimizers[0].param_groups}
    assert {0.5**depth for depth in range(13)} <= scales


def test_checkpoint_loads_without_arguments(tmp_path, loader):
    module = classifier(
        strategy=tdm.TDM(0.5, merger=tdm.TokenMerger(cluster_fraction=0.5, matching="greedy"))
    )
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(module, loader)
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    again = TokenReductionClassifier.load_from_checkpoint(path)
    assert again.model.strategy.config() == module.model.strategy.config()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), module.eval()(images))


def test_stored_hyperparameters_are_plain_values(tmp_path, loader):
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(classifier(), loader)
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert stored["strategy"]["class_path"].endswith("TDM")
    assert stored["model_kwargs"] == KWARGS


def test_subclass_with_its_own_argument_reloads(tmp_path, loader):
    path = tmp_path / "model.ckpt"
    module = Tempered(
        2.0,
        model="deit_tiny_patch16_224",
        model_kwargs=KWARGS,
        num_classes=CLASSES,
        warmup_epochs=0,
    )
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(module, loader)
    run.save_checkpoint(path)
    assert Tempered.load_from_checkpoint(path).temperature == 2.0


class Tempered(TokenReductionClassifier):
    def __init__(self, temperature: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature

    def configure_criterion(self):
        inner = super().configure_criterion()
        return lambda logits, target: inner(logits / self.temperature, target)


def test_wraps_a_module_and_replaces_its_head():
    vit = VisionTransformer(**KWARGS, num_classes=7)
    module = TokenReductionClassifier(vit, tdm.TDM(), num_classes=CLASSES)
    assert module.model.vit is vit
    assert module(torch.randn(1, 3, 32, 32)).shape == (1, CLASSES)


def test_starts_from_the_weights_of_another_run(tmp_path, loader):
    plain = classifier(strategy=None)
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(plain, loader)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    reduced = classifier(strategy=tdm.TDM(1.0), weights=str(tmp_path / "plain.ckpt"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(reduced.eval()(images), plain.eval()(images))


def test_checkpoint_does_not_need_the_file_that_training_started_from(tmp_path, loader):
    start = tmp_path / "start.pth"
    torch.save({"model": VisionTransformer(**KWARGS, num_classes=CLASSES).state_dict()}, start)
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(classifier(weights=str(start)), loader)
    run.save_checkpoint(tmp_path / "model.ckpt")
    start.unlink()
    TokenReductionClassifier.load_from_checkpoint(tmp_path / "model.ckpt")


def test_dyvit_learns_from_its_starting_weights(tmp_path, loader):
    start = tmp_path / "start.pth"
    torch.save({"model": VisionTransformer(**KWARGS, num_classes=CLASSES).state_dict()}, start)
    module = classifier(strategy=tdm.DyViT(freeze_epochs=1), weights=str(start), lr=1e-3)
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(module, loader, loader)
    assert {"train/task", "train/ratio"} <= set(run.callback_metrics)
    moved = {
        name
        for name, value in module.model.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert moved
    assert all(
        name.startswith("strategy.") for name in moved
    )  # the backbone is frozen in the first epoch
    run.save_checkpoint(tmp_path / "model.ckpt")
    stored = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert not any("teacher" in name for name in stored)
    TokenReductionClassifier.load_from_checkpoint(tmp_path / "model.ckpt")


def test_dyvit_without_trained_weights_has_no_teacher(tmp_path, loader):
    with pytest.raises(ValueError, match="set model.weights"):
        trainer(tmp_path).fit(classifier(strategy=tdm.DyViT()), loader)


def test_predicts_probabilities_and_names(tmp_path, loader):
    module = classifier(label_names=["ant", "bee", "cat", "dog", "eel"])
    batch = trainer(tmp_path).predict(module, loader)[0]
    torch.testing.assert_close(batch["probabilities"].sum(-1), torch.ones(4))
    assert batch["name"] == [module.label_names[index] for index in batch["label"]]


def test_ema_through_lightnings_callback(tmp_path, loader):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(classifier(), loader, loader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet18", "model_kwargs": {}}, "cannot reduce"),
        ({"strategy": {"class_path": "Unheard"}}, "not a known Strategy"),
        ({"strategy": "TDM"}, "must be a Strategy"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier(**settings)


def test_schedule_needs_an_end(tmp_path, loader):
    with pytest.raises(ValueError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(classifier(), loader)


def test_warm_up_longer_than_the_run(tmp_path, loader):
    with pytest.raises(ValueError, match="warm-up"):
        trainer(tmp_path).fit(classifier(warmup_epochs=5), loader)
