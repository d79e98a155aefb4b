"""A loss that is no number ends the run before it reaches the weights."""

import pytest
import torch
from lightning.pytorch import Callback

import tdm_lightning as tdm
from tdm_lightning.errors import TrainingError
from tdm_lightning.training.finite import check_loss
from tests.helpers.localsets import make_arrow
from tests.training.test_resume import Watch, fit, make_data


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=8, size=24))


class Poison(Callback):
    """Images of the fourth step are no numbers."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            batch[0].fill_(torch.nan)


def test_a_loss_that_is_no_number_ends_the_run_and_is_named(tmp_path, images):
    class Poisoned(Watch, Poison):
        def setup(self, trainer, module, stage):
            self.module = module

    watch = Poisoned()
    settings = {"strategy": tdm.TDM(0.7, layers=(1, 2)), "lr": 0.25, "warmup_epochs": 0}
    with pytest.raises(
        TrainingError,
        match=r"not finite in step 3 \(epoch 0, batch 3\): \w+ nan; learning rate 0\.2\d*,"
        r" TDM\(keep_rate=0\.7, layers=\[1, 2\].*\)\. The weights are .*last checkpoint",
    ):
        fit(tmp_path, make_data(images), watch, module=settings)
    assert list(watch.losses) == [(0, 0), (0, 1), (0, 2)]
    assert all(value.isfinite().all() for value in watch.module.parameters())


def test_where_the_strategy_stands_is_named_and_which_term_it_was():
    strategy = tdm.DyViT(0.5, (1,))
    strategy.current_keep_rate = 0.8
    terms = {"task": torch.tensor(2.5), "ratio": torch.tensor(torch.inf)}
    with pytest.raises(
        TrainingError, match=r"in step 7: task 2.5, ratio inf; .* DyViT\(.*\) at a keep rate of 0.8"
    ):
        check_loss(terms, strategy, [1e-3], "step 7")
    check_loss({"task": terms["task"]}, strategy, [1e-3], "step 7")
