"""What users of LightningCLI do to any training: accumulate, distribute, average, search a rate,
watch.
"""

import json
import os

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from tdm_lightning.callbacks.batches import batch_size

import tdm_lightning as tdm
from tdm_lightning import ImageNetDataModule, TokenReductionClassifier
from tdm_lightning.cli import main
from tdm_lightning.flops import count_macs, mac_report, step_flops
from tests.helpers.localsets import make_arrow

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=8, size=24))


class Watch(Callback):
    """Losses of batches; learning rates of steps, by parameter group; weights after them."""

    def __init__(self):
        self.losses, self.rates, self.weights = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.weights.append(
            {name: value.clone() for name, value in module.model.state_dict().items()}
        )


def fit(images, *callbacks, batch_size=4, data=None, ckpt_path=None, trainer=None, **changes):
    """A seeded run; augmentation is on, but nothing random is in the model, so that batches can be
    put together.
    """
    seed_everything(7, verbose=False)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {
        "strategy": tdm.TDM(0.7, layers=(1, 2)),
        "num_classes": 3,
        "drop_path": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    }
    settings |= {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 0.0,
        "warmup_epochs": 1,
        "warmup_lr": 0.01,
    }
    module = TokenReductionClassifier(
        "deit_tiny_patch16_224", model_kwargs=VIT, **{**settings, **changes}
    )
    module_data = {
        "model": "deit_tiny_patch16_224",
        "model_kwargs": VIT,
        "num_workers": 0,
        "batch_size": batch_size,
    }
    run = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        **{"max_epochs": 2, **quiet, **(trainer or {})},
    )
    run.fit(
        module,
        ImageNetDataModule(images, cache_dir=images, **module_data, **(data or {})),
        ckpt_path=ckpt_path,
    )
    return module


def assert_same_weights(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


# Batches in parts


def test_accumulated_halves_make_the_step_of_the_joint_batch(images):
    joint, halves = Watch(), Watch()
    at_once = fit(images, joint, batch_size=8)
    parts = fit(images, halves, batch_size=4, trainer={"accumulate_grad_batches": 2})
    assert len(joint.losses) == 6
    assert [sum(halves.losses[i : i + 2]) / 2 for i in range(0, 12, 2)] == pytest.approx(
        joint.losses, rel=1e-5
    )
    assert halves.rates == joint.rates
    assert_same_weights(parts.state_dict(), at_once.state_dict(), rtol=1e-4, atol=1e-6)


def test_the_schedule_counts_steps_where_an_epoch_ends_with_part_of_one(images):
    watch = Watch()
    trainer = {"accumulate_grad_batches": 2, "limit_train_batches": 5, "max_epochs": 3}
    fit(images, watch, trainer=trainer, lr=0.1, min_lr=0.0)
    rates = [groups[0] for groups in watch.rates]
    assert len(rates) == 9
    assert rates[:4] == pytest.approx([0.01, 0.04, 0.07, 0.1])  # an epoch of warm-up is three steps
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_trial_run_shortens_its_warm_up_and_says_so(images, monkeypatch):
    said, watch = [], Watch()
    monkeypatch.setattr("tdm_lightning.training.module.rank_zero_info", said.append)
    fit(images, watch, trainer={"fast_dev_run": 2}, lr=0.1, warmup_epochs=5)
    assert said == ["fast_dev_run: 1 steps of warm-up in place of 10"]
    assert [groups[0] for groups in watch.rates] == pytest.approx([0.01, 0.1])


class Told(Callback):
    """Writes the losses of each process down."""

    def __init__(self, folder):
        self.folder, self.losses = str(folder), []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_fit_end(self, trainer, module):
        with open(
            os.path.join(self.folder, f"{trainer.global_rank}of{trainer.world_size}.json"), "w"
        ) as file:
            json.dump(self.losses, file)


@pytest.mark.skipif(
    "fork" not in torch.multiprocessing.get_all_start_methods(),
    reason="needs fork, to start quickly",
)
@pytest.mark.parametrize("repeats", [0, 3])
def test_two_processes_have_the_loss_of_one_with_the_joint_batch(tmp_path, images, repeats):
    data = {"repeated_augmentation": repeats}
    alone = fit(images, Told(tmp_path), batch_size=8, data=data)
    both = fit(
        images,
        Told(tmp_path),
        batch_size=4,
        data=data,
        trainer={"strategy": "ddp_fork", "devices": 2},
    )
    joint = json.loads((tmp_path / "0of1.json").read_text())
    ranks = [json.loads((tmp_path / f"{rank}of2.json").read_text()) for rank in range(2)]
    assert len(joint) == 6
    assert ranks[0] != ranks[1]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(joint, rel=1e-5)
    assert_same_weights(both.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    "fork" not in torch.multiprocessing.get_all_start_methods(),
    reason="needs fork, to start quickly",
)
def test_two_processes_go_on_within_an_epoch(tmp_path, images):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    recipe = {"mixup": 0.8, "drop_path": 0.3}  # each process draws its own
    trainer = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": True}
    losses = []
    for extra in ({}, {"ckpt_path": str(tmp_path / "four.ckpt")}):
        fit(images, Told(tmp_path), Save(), trainer=trainer, **recipe, **extra)
        losses.append([json.loads((tmp_path / f"{rank}of2.json").read_text()) for rank in range(2)])
    uninterrupted, resumed = losses
    assert [len(rank) for rank in uninterrupted] == [6, 6]
    assert resumed == [rank[4:] for rank in uninterrupted]


# Moving average


def test_moving_average(tmp_path, images):
    watch, scores = Watch(), {}

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "eight.ckpt")

        def on_validation_end(self, trainer, module):
            scores.update(trainer.callback_metrics)
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    def averaging():
        return EMAWeightAveraging(decay=0.5)

    averaged = fit(images, averaging(), watch, Save())
    expected = watch.weights[0]
    for weights in watch.weights[1:]:
        expected = {name: 0.5 * expected[name] + 0.5 * value for name, value in weights.items()}
    assert_same_weights(averaged.model.state_dict(), expected)  # after training
    loaded = TokenReductionClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert_same_weights(loaded.model.state_dict(), expected)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = ImageNetDataModule(
        images, cache_dir=images, model_kwargs=VIT, model="deit_tiny_patch16_224", num_workers=0
    )
    (score,) = trainer.validate(loaded, data, verbose=False)
    assert score["val/loss"] == pytest.approx(
        scores["val/loss"].item(), rel=1e-4
    )  # validation used the average
    again = Watch()
    resumed = fit(images, averaging(), again, ckpt_path=tmp_path / "eight.ckpt")
    assert again.losses == watch.losses[8:]
    assert_same_weights(resumed.state_dict(), averaged.state_dict(), rtol=0, atol=0)


# Learning rate


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_training_uses_the_rate_that_was_found(tmp_path, images, layer_decay):
    found, given = Watch(), Watch()
    finder = LearningRateFinder(
        min_lr=1e-4, max_lr=1.0, num_training_steps=11 + 4, early_stop_threshold=None
    )
    trainer = {"default_root_dir": tmp_path, "max_epochs": 3}
    module = fit(images, finder, found, trainer=trainer, layer_decay=layer_decay)
    rate = finder.optimal_lr.suggestion()
    assert rate != 0.1
    assert module.hparams.lr == rate
    assert len(found.losses) == 18  # the search itself does not count
    assert max(max(groups) for groups in found.rates) == pytest.approx(rate)
    fit(images, given, trainer=trainer, layer_decay=layer_decay, lr=rate)
    assert found.rates == given.rates
    assert found.losses == given.losses


# Throughput


@pytest.mark.parametrize("training", [False, True])
def test_operations_of_a_step(training):
    def reduced(strategy):
        return TokenReductionClassifier(
            "deit_tiny_patch16_224", strategy, 3, model_kwargs=VIT
        ).model.train(training)

    passes = 3 if training else 1
    model = reduced(tdm.TDM(0.7, layers=(1, 2)))
    assert step_flops(model, (5, 3, 16, 16)) == passes * 2 * 5 * mac_report(model).total
    masked = reduced(tdm.DyViT(0.7, layers=(1, 2)))
    plain = passes * 2 * count_macs(masked.vit)
    assert (step_flops(masked, (1, 3, 16, 16)) >= plain) == training  # it trains with all tokens
    assert masked.training == training
    with pytest.raises(ValueError, match="another number of tokens"):
        step_flops(reduced(tdm.AViT()), (1, 3, 16, 16))


@pytest.mark.parametrize(
    "strategy", [tdm.TDM(0.7, layers=(1, 2)), tdm.AViT()], ids=["fixed", "adaptive"]
)
def test_throughput(tmp_path, images, strategy):
    logged = {}

    class Logger(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.update(metrics)

    monitor = ThroughputMonitor(batch_size, window_size=3)
    trainer = {"logger": Logger(tmp_path), "log_every_n_steps": 1}
    module = fit(images, monitor, trainer=trainer, strategy=strategy)
    for stage in ("train", "validate"):
        batches = logged[f"{stage}/device/batches_per_sec"]
        assert logged[f"{stage}/device/samples_per_sec"] == pytest.approx(4 * batches)
        if strategy.adaptive:
            assert f"{stage}/device/flops_per_sec" not in logged
        else:
            flops = step_flops(module.model.train(stage == "train"), (4, 3, 16, 16))
            assert logged[f"{stage}/device/flops_per_sec"] == pytest.approx(flops * batches)


# The layers that ship


def test_addons_go_on_top_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    layer = {
        "trainer": {
            "max_epochs": 1,
            "limit_train_batches": 14,
            "limit_val_batches": 2,
            "check_val_every_n_epoch": 1,
        },
        "model": {
            "model_kwargs": {**VIT, "in_chans": 1},
            "strategy": {"init_args": {"layers": [1, 2]}},
            "warmup_epochs": 0,
        },
        "data": {"batch_size": 4},
    }
    layer["trainer"] |= {"enable_progress_bar": False, "log_every_n_steps": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(layer))
    configs = [
        "quickstart",
        "addons/tensorboard",
        "addons/ema",
        "addons/throughput",
        "addons/lr_finder",
        "small.yaml",
    ]
    settings = [
        "--trainer.callbacks.num_training_steps=13",
        "--trainer.callbacks.early_stop_threshold=null",
    ]
    cli = main(["fit", *(f"--config={name}" for name in configs), *settings])
    kinds = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {
        "EMAWeightAveraging",
        "LearningRateFinder",
        "ThroughputMonitor",
        "TokenVisualizer",
        "ModelCheckpoint",
    } <= kinds
    assert cli.model.hparams.lr != 2e-3
    events = EventAccumulator(str(tmp_path / "runs/tensorboard/version_0"))
    events.Reload()
    assert {"train/loss", "val/top1"} <= set(events.Tags()["scalars"])
    picture, *_ = events.Tags()["images"]
    assert picture == "tokens/val_0"
    *_, event = events.Images(picture)
    assert event.encoded_image_string.startswith(b"\x89PNG")
    assert event.width > event.height > 100
