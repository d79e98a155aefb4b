"""The annealed keep rate: EViT's values, and what a run makes of them."""

import pytest
import torch
from lightning.pytorch import Callback
from tdm_lightning.callbacks import KeepRateWarmup
from tdm_lightning.callbacks.keep_rate_warmup import cosine_keep_rate
from torch.utils.data import IterableDataset

import tdm_lightning as tdm
from tests.callbacks.foreign import Foreign, loader, small_vit, trainer

#: ``adjust_keep_rate`` of the official EViT: iteration and keep rate, 5 iterations an epoch,
#: falling in epochs 2 to 7.
OFFICIAL = {
    0: 1,
    3: 1,
    6: 1,
    9: 1,
    12: 0.9967221401100709,
    15: 0.9799038105676658,
    18: 0.9503695909538288,
    21: 0.9110104964613701,
    24: 0.8656792694901481,
    27: 0.8188132463773361,
    30: 0.775,
    33: 0.7385282761783908,
    36: 0.7129681813536098,
    39: 0.7008217156947589,
    42: 0.7,
    45: 0.7,
    48: 0.7,
}


class Rates(Callback):
    def __init__(self):
        self.train, self.val, self.sanity, self.test = {}, {}, [], []

    def rate(self, module):
        return module.encoder.strategy.current_keep_rate

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.train[trainer.current_epoch * trainer.num_training_batches + batch_idx] = self.rate(
            module
        )

    def on_validation_batch_start(self, trainer, module, *args):
        if trainer.sanity_checking:
            self.sanity.append(self.rate(module))
        else:
            self.val[trainer.current_epoch] = self.rate(module)

    def on_test_batch_start(self, trainer, module, *args):
        self.test.append(self.rate(module))


def module():
    return Foreign(tdm.attach(small_vit(), tdm.TDM(0.7, layers=(1, 2))))


def test_a_run_has_the_official_rates(tmp_path):
    rates, net = Rates(), module()
    run = trainer(tmp_path, KeepRateWarmup(2, 6), rates, max_epochs=10)
    run.fit(net, loader(10, batch_size=2), loader(2))
    assert {step: rates.train[step] for step in OFFICIAL} == OFFICIAL
    assert rates.val == {epoch: rates.train[5 * epoch + 4] for epoch in range(10)}, (
        "validation uses the current rate"
    )
    assert rates.sanity == [1.0]
    assert net.encoder.strategy.current_keep_rate is None
    run.test(net, loader(2), verbose=False)
    assert rates.test == [None]


def test_accumulated_gradients_change_nothing(tmp_path):
    seen = []
    for steps in (1, 3):
        rates = Rates()
        run = trainer(
            tmp_path, KeepRateWarmup(0, 2), rates, max_epochs=3, accumulate_grad_batches=steps
        )
        run.fit(module(), loader(10, batch_size=2))
        seen.append(rates.train)
    assert seen[0] == seen[1]
    assert seen[0][7] == cosine_keep_rate(0.7, 0.7)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    whole, first, second = Rates(), Rates(), Rates()
    trainer(tmp_path, KeepRateWarmup(1, 3), whole, max_epochs=5).fit(module(), loader())
    run = trainer(tmp_path, KeepRateWarmup(1, 3), first, max_epochs=2)
    run.fit(module(), loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    trainer(tmp_path, KeepRateWarmup(1, 3), second, max_epochs=5).fit(
        module(), loader(), ckpt_path=tmp_path / "two.ckpt"
    )
    assert min(second.train) == 6
    assert first.train | second.train == whole.train


def test_an_interrupted_run_leaves_the_strategy_its_own_rate(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    net = module()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, KeepRateWarmup(), Stop()).fit(net, loader())
    assert net.encoder.strategy.current_keep_rate is None


def test_a_loader_without_length_steps_once_per_epoch(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(index % 3, torch.zeros(3, 32, 32)) for index in range(4)])

    rates = Rates()
    batches = torch.utils.data.DataLoader(Stream(), batch_size=2)
    rates.on_train_batch_end = lambda trainer, module, *args: rates.train.setdefault(
        trainer.current_epoch, []
    ).append(rates.rate(module))
    trainer(tmp_path, KeepRateWarmup(0, 2), rates, max_epochs=3).fit(module(), batches)
    assert rates.train == {0: [1.0, 1.0], 1: [cosine_keep_rate(0.7, 0.5)] * 2, 2: [0.7, 0.7]}


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (small_vit(), "needs a ViT that reduces its tokens"),
        (tdm.attach(small_vit(), tdm.ToMe(2)), "ToMe has none"),
    ],
    ids=["plain", "no keep rate"],
)
def test_nothing_to_warm_up(tmp_path, encoder, message):
    with pytest.raises(TypeError, match=message):
        trainer(tmp_path, KeepRateWarmup()).fit(Foreign(encoder), loader())


@pytest.mark.parametrize(
    ("settings", "error"), [((-1, 5), ValueError), ((0, 0), ValueError), ((1.5, 5), TypeError)]
)
def test_wrong_settings(settings, error):
    with pytest.raises(error):
        KeepRateWarmup(*settings)
