"""A run that was cut off goes on as if it had not been: same images, same augmentation, same
losses.
"""

import warnings
from itertools import islice

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import tdm_lightning as tdm
from tdm_lightning import ImageNetDataModule, TokenReductionClassifier
from tdm_lightning.cli import main
from tests.helpers.localsets import make_arrow
from tests.helpers.trainers import QUIET

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 4}
EPOCHS, BATCHES = 3, 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=8, size=24))


def make_data(images, **changes):
    settings = {
        "model": "deit_tiny_patch16_224",
        "model_kwargs": VIT,
        "batch_size": 4,
        "num_workers": 0,
    }
    return ImageNetDataModule(images, cache_dir=images, **{**settings, **changes})


class Watch(Callback):
    """Remembers the loss of every step, by epoch and batch; saves at some moments, such as
    ``batch3``.
    """

    def __init__(self, folder=None, *moments):
        self.losses, self.modes, self.folder, self.moments = {}, set(), folder, moments

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.current_epoch, batch_idx] = outputs["loss"].item()
        self.modes.add(module.model.vit.training)
        self.save(trainer, f"batch{trainer.global_step}")

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.save(trainer, f"val{trainer.global_step}")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, f"epoch{trainer.global_step}")

    def save(self, trainer, name):
        if name in self.moments:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def fit(tmp_path, data, watch, ckpt_path=None, module=None, **changes):
    """A run with everything random that there is: RandAugment, erasing, mixup, cutmix, drop-path,
    dropped tokens.
    """
    seed_everything(7, verbose=False)
    settings = {
        "model": "deit_tiny_patch16_224",
        "model_kwargs": {**VIT, "drop_rate": 0.2},
        "num_classes": 3,
        "strategy": tdm.Random(0.7, layers=(1, 2)),
        "drop_path": 0.3,
        "warmup_epochs": 1,
    }
    trainer = Trainer(
        **QUIET,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[watch],
        **{"max_epochs": EPOCHS, "val_check_interval": 2, "limit_val_batches": 2, **changes},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
        trainer.fit(
            TokenReductionClassifier(**{**settings, **(module or {})}), data, ckpt_path=ckpt_path
        )
    return trainer


def after(losses, step):
    return dict(islice(losses.items(), step, None))


KINDS = {
    "map": {},
    "repeated": {"repeated_augmentation": 3},
    "workers": {"num_workers": 2},
    "stream": {"streaming": True, "shuffle_buffer": 10},
    "stream, workers": {"streaming": True, "shuffle_buffer": 10, "num_workers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_losses_of_one_never_interrupted(tmp_path, images, kind):
    # In an epoch, at its last batch, validating in its middle and at its end, at its end, in the
    # last epoch.
    moments = (
        ["batch3", "batch6", "val8", "val12", "epoch12", "batch17"]
        if kind == "map"
        else ["batch9", "epoch6"]
    )
    uninterrupted = Watch(tmp_path, *moments)
    fit(tmp_path, make_data(images, **KINDS[kind]), uninterrupted)
    assert len(set(uninterrupted.losses.values())) == EPOCHS * BATCHES
    for moment in moments:
        step = int(moment.lstrip("abcdefghijklmnopqrstuvwxyz"))
        resumed = Watch()
        fit(tmp_path, make_data(images, **KINDS[kind]), resumed, tmp_path / f"{moment}.ckpt")
        assert resumed.losses == after(uninterrupted.losses, step), moment


def test_a_run_goes_on_with_another_number_of_workers(tmp_path, images):
    uninterrupted, resumed = Watch(tmp_path, "batch9"), Watch()
    flat = {"max_epochs": 2, "module": {"warmup_epochs": 0}}
    fit(tmp_path, make_data(images, num_workers=2), uninterrupted, **flat)
    fit(tmp_path, make_data(images, num_workers=0), resumed, tmp_path / "batch9.ckpt", **flat)
    assert resumed.losses == after(uninterrupted.losses, 9)


@pytest.mark.parametrize("moment", ["batch4", "batch6", "epoch6"])
def test_a_run_that_ended_by_its_steps_goes_on(tmp_path, images, moment):
    # A schedule that does not know the length of the run.
    flat = {"min_lr": 5e-4, "warmup_epochs": 0}
    uninterrupted, first, second = Watch(), Watch(tmp_path, moment), Watch()
    run = {"max_epochs": -1, "module": flat}
    steps = int(moment[-1])
    fit(tmp_path, make_data(images), uninterrupted, max_steps=14, **run)
    fit(tmp_path, make_data(images), first, max_steps=steps, **run)
    fit(tmp_path, make_data(images), second, tmp_path / f"{moment}.ckpt", max_steps=14, **run)
    losses = list(uninterrupted.losses.values())
    assert list(first.losses.values()) == losses[:steps]
    assert list(second.losses.values()) == losses[steps:]


def test_a_model_in_eval_mode_stays_in_it(tmp_path, images):
    uninterrupted, resumed = Watch(tmp_path, "batch3"), Watch()
    module = {"train_in_eval_mode": True, "warmup_epochs": 0}
    fit(tmp_path, make_data(images), uninterrupted, max_epochs=1, module=module)
    fit(tmp_path, make_data(images), resumed, tmp_path / "batch3.ckpt", max_epochs=1, module=module)
    assert uninterrupted.modes == resumed.modes == {False}
    assert resumed.losses == after(uninterrupted.losses, 3)


def test_a_foreign_module_gets_the_images_it_would_have_had(tmp_path, images):
    from tests.data.test_sampling import Probe

    class Seen(Probe):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.batches[self.current_epoch, batch_idx] = batch[0].sum().item()
            if (self.current_epoch, batch_idx) == (1, 3):
                self.trainer.save_checkpoint(tmp_path / "foreign.ckpt")

    seen = []
    for ckpt_path in (None, tmp_path / "foreign.ckpt"):
        seed_everything(3, verbose=False)
        probe = Seen()
        probe.batches = {}
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        Trainer(accelerator="cpu", max_epochs=2, **quiet).fit(
            probe, make_data(images), ckpt_path=ckpt_path
        )
        seen.append(probe.batches)
    assert len(seen[1]) == 2
    assert seen[1] == after(seen[0], 10)


@pytest.mark.parametrize("kind", ["map", "workers", "stream, workers"])
def test_a_plain_loop_goes_on_with_the_loaders_state(images, kind):
    def loader():
        data = make_data(images, **KINDS[kind])
        data.setup("fit")
        return data.train_dataloader()

    def pixels(batches):
        return [batch.sum().item() for batch, _ in batches]

    seed_everything(1, verbose=False)
    uninterrupted = loader()
    first, second, third = (pixels(uninterrupted) for _ in range(3))
    assert len(set(first + second + third)) == 3 * BATCHES
    cut = loader()
    assert pixels(cut) == first
    assert pixels(islice(cut, 2)) == second[:2]
    state = cut.state_dict()
    assert state == {"epoch": 1, "batches": 2}
    resumed = loader()
    resumed.load_state_dict(state)
    assert pixels(resumed) == second[2:]
    assert pixels(resumed) == third
    assert pixels(cut) == third, "a pass that was left early is over"


def test_through_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        watch = Watch()
        shared = [
            "fit",
            "--config=quickstart",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
        ]
        shared += [
            "--trainer.max_epochs=2",
            "--trainer.limit_val_batches=0",
            "--data.augment=true",
            "--data.batch_size=32",
        ]
        shared += [
            "--trainer.limit_train_batches=6",
            "--model.model_kwargs.depth=4",
            "--model.strategy.layers=[1,2]",
        ]
        shared += [
            "--trainer.callbacks=ModelCheckpoint",
            "--trainer.callbacks.every_n_train_steps=4",
        ]
        shared += [
            "--trainer.callbacks.dirpath=kept",
            "--trainer.callbacks.save_top_k=-1",
            "--model.warmup_epochs=0",
        ]

        class Watched(TokenReductionClassifier):
            def configure_callbacks(self):
                return [watch]

        main([*shared, *arguments], model_class=Watched)
        return watch.losses

    uninterrupted = run()
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == ["epoch=0-step=4.ckpt", "epoch=1-step=12.ckpt", "epoch=1-step=8.ckpt"]
    assert run("--ckpt_path=kept/epoch=0-step=4.ckpt") == after(uninterrupted, 4)


def test_model_checkpoint_keeps_the_best_and_the_last(tmp_path, images):
    scores = []

    class Scores(Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                scores.append(trainer.callback_metrics["val/loss"].item())

    keep = ModelCheckpoint(
        tmp_path, "best", monitor="val/loss", save_last=True, enable_version_counter=False
    )
    data = make_data(images)
    seed_everything(0, verbose=False)
    module = TokenReductionClassifier(
        "deit_tiny_patch16_224", None, 3, model_kwargs=VIT, warmup_epochs=0, lr=1e-2
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_progress_bar=False,
        callbacks=[Scores(), keep],
    )
    trainer.fit(module, data)
    best = TokenReductionClassifier.load_from_checkpoint(keep.best_model_path)
    assert trainer.validate(best, data, verbose=False)[0]["val/loss"] == pytest.approx(min(scores))
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, last[name]) for name, value in module.state_dict().items())
