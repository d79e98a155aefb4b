"""Diversity of the tokens in a foreign run."""

import pytest
import torch
from tdm_lightning.callbacks import DiversityMonitor, FLOPsMonitor, TokenVisualizer

import tdm_lightning as tdm
from tdm_lightning.metrics import DiversityScore, diversity_score
from tdm_lightning.vit.find import hook_blocks
from tests.callbacks.foreign import Foreign, loader, small_vit, trainer


def measured(tmp_path, encoder, form="tuple", **settings):
    monitor = DiversityMonitor(**settings)
    run = trainer(tmp_path, monitor)
    run.validate(Foreign(encoder), loader(form=form), verbose=False)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    assert list(logged.values()) == monitor.scores["val"]
    assert list(logged) == [f"diversity/val/block_0{block}" for block in range(4)]
    return monitor.scores["val"]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_plain_and_keep_rate_1_agree_and_a_lower_one_differs(tmp_path, form):
    vit = small_vit()
    plain = measured(tmp_path, vit, form)
    assert measured(tmp_path, tdm.attach(vit, tdm.TDM(1.0, layers=(1, 2))), form) == pytest.approx(
        plain, rel=1e-5
    )
    reduced = measured(tmp_path, tdm.attach(vit, tdm.TDM(0.7, layers=(1, 2))), form)
    assert reduced[0] == pytest.approx(plain[0], rel=1e-5)
    assert all(less < 0.9 * more for less, more in zip(reduced[1:], plain[1:], strict=True))


def test_score_is_that_of_the_patch_tokens(tmp_path):
    vit = small_vit(reg_tokens=2).eval()
    images = torch.cat([batch[1] for batch in loader()])
    expected = {}

    def see(index, tokens, valid):
        expected[index] = diversity_score(tokens[:, 3:], "column", normalize=True).mean().item()

    with torch.no_grad(), hook_blocks(vit, see):
        vit(images)
    scores = measured(tmp_path, vit, norm="column", normalize=True)
    assert scores == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.fixture
def updates(monkeypatch):
    """Batch sizes of all updates of the metric."""
    seen, update = [], DiversityScore.update
    monkeypatch.setattr(
        DiversityScore,
        "update",
        lambda self, z, valid=None: seen.append(len(z)) or update(self, z, valid),
    )
    return seen


def test_listens_to_few_batches(tmp_path, updates):
    run = trainer(tmp_path, DiversityMonitor(max_batches=2, stages=["val"]))
    run.fit(Foreign(small_vit()), loader(), loader(20, batch_size=4))
    assert updates == [4] * 2 * 4  # two batches, four blocks, nothing of the sanity check


def test_several_loaders_share_one_score(tmp_path, updates):
    run = trainer(tmp_path, DiversityMonitor(max_batches=2))
    run.validate(
        Foreign(small_vit()), [loader(), loader(6, batch_size=2, form="dict")], verbose=False
    )
    assert updates == [4] * 2 * 4 + [2] * 2 * 4
    assert set(run.callback_metrics) == {f"diversity/val/block_0{block}" for block in range(4)}


def test_logs_prints_and_plots_every_stage(tmp_path, capsys):
    monitor = DiversityMonitor(stages=("train", "val", "test"), dir=str(tmp_path / "plots"))
    run = trainer(tmp_path, monitor, max_epochs=2)
    net = Foreign(tdm.attach(small_vit(), tdm.EViT(0.5, layers=(1,))))
    run.fit(net, loader(), loader())
    assert "diversity/train/block_03" in (tmp_path / "metrics.csv").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "diversity_train.png",
        "diversity_val.png",
    }
    run.test(net, loader(), verbose=False)
    assert (tmp_path / "plots" / "diversity_test.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert [printed.count(f"({stage})") for stage in ("train", "val", "test")] == [1, 1, 1]
    assert f"3: {monitor.scores['test'][3]:.4g}" in printed


def test_no_hook_stays(tmp_path):
    class Failing(Foreign):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise RuntimeError("stop")

    net = Failing(small_vit())
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, DiversityMonitor()).validate(net, loader())
    assert not any(block._forward_hooks for block in net.encoder.blocks)


@pytest.mark.parametrize("first", [0, 1], ids=["listed first", "listed last"])
def test_other_callbacks_passes_do_not_count(tmp_path, first):
    model = tdm.attach(small_vit(), tdm.TDM(0.5, layers=(1,)))
    alone = measured(tmp_path, model)
    monitor, others = (
        DiversityMonitor(),
        [
            FLOPsMonitor(),
            TokenVisualizer(3, dir=str(tmp_path / "pictures")),
        ],
    )
    callbacks = [monitor, *others] if first == 0 else [*others, monitor]
    trainer(tmp_path, *callbacks).validate(Foreign(model), loader(), verbose=False)
    assert monitor.scores["val"] == alone


def test_says_when_the_vit_was_not_called(tmp_path):
    class Idle(Foreign):
        def validation_step(self, batch, batch_idx):
            pass

    run = trainer(tmp_path, DiversityMonitor())
    with pytest.warns(UserWarning, match="saw no tokens"):
        run.validate(Idle(small_vit()), loader(), verbose=False)
    assert not run.callback_metrics


def test_blocks_that_are_run_again_in_the_backward_pass_count_once(tmp_path, updates):
    vit = small_vit()
    vit.set_grad_checkpointing()
    trainer(tmp_path, DiversityMonitor(stages=["train"])).fit(Foreign(vit), loader())
    assert updates == [4] * 3 * 4


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, DiversityMonitor(), TokenVisualizer(), fast_dev_run=1)
    run.fit(Foreign(tdm.attach(small_vit(), tdm.TDM(layers=(1,)))), loader(), loader())
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l2"}, "norm must be one of"),
        ({"stages": ["fit"]}, "stages must be one of"),
        ({"max_batches": 0}, "at least 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiversityMonitor(**settings)


def test_a_module_without_a_vit_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="no ViT in Foreign"):
        trainer(tmp_path, DiversityMonitor()).validate(Foreign(torch.nn.Linear(2, 2)), loader())


def test_one_of_several_vits(tmp_path):
    net = Foreign(small_vit())
    net.teacher = small_vit(depth=2)
    monitor = DiversityMonitor(vit="encoder")
    trainer(tmp_path, monitor).validate(net, loader(), verbose=False)
    assert len(monitor.scores["val"]) == 4
