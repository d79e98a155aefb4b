"""Parameters in shards over two nodes (FSDP2): the same steps as DDP's, for every method that has a
state of its own; and what cannot be sharded is refused.
"""

from functools import partial
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import FSDPStrategy

from tdm_lightning import TokenReductionClassifier
from tdm_lightning.cli import main
from tests.helpers.fits import (
    AVERAGE,
    BATCHES,
    CASES,
    DRAW_NOTHING,
    EPOCHS,
    IMAGES,
    arguments,
    assert_same,
    fit,
    means,
    sharded,
    start,
    train,
)
from tests.helpers.localsets import make_arrow
from tests.helpers.nodes import needs_fork, on_nodes

pytestmark = [pytest.mark.slow, needs_fork]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=IMAGES // 3, size=24))


@pytest.mark.parametrize("case", [case for case in CASES if AVERAGE not in CASES[case][1]])
def test_shards_make_the_steps_of_whole_parameters(tmp_path, images, case):
    start(tmp_path)
    whole = train(tmp_path, images, case, 2, name="whole")
    parts = train(tmp_path, images, case, 2, name="parts", kept="shards", **sharded(2))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["share"] == pytest.approx(0.5, abs=0.05)
        assert theirs["share"] == 1
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["rates"] == theirs["rates"]
        assert ours["stage"] == theirs["stage"]
        assert_same(ours["teacher"], theirs["teacher"])
        for mask, expected in zip(ours["masks"], theirs["masks"], strict=True):
            assert_same(mask, expected)
        assert_same(ours["weights"], theirs["weights"], rtol=1e-3, atol=1e-5)
    # Whole again in one process, in the middle of an epoch.
    rest = train(tmp_path, images, case, 1, "--ckpt_path=shards/4.ckpt", name="rest")
    assert (rest[0]["epoch"], rest[0]["step"]) == (EPOCHS, EPOCHS * BATCHES)
    if case in DRAW_NOTHING:
        expected = means(parts)
        expected = {key: expected[key] for key in rest[0]["losses"]}
        assert means(rest) == pytest.approx(expected, rel=1e-4)
        assert_same(rest[0]["weights"], parts[0]["weights"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["TDM", "SViTE, heads and units", "DyViT"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_folder_of_shards_goes_on_with_another_number_of_processes(
    tmp_path, images, case, before, after
):
    start(tmp_path)
    both = train(tmp_path, images, case, before, **sharded(before, folders=True))
    assert (tmp_path / "kept" / "4.ckpt").is_dir()
    resume = "--ckpt_path=kept/4.ckpt"
    rest = train(tmp_path, images, case, after, resume, kept="again", **sharded(after, True))
    assert {(rank["epoch"], rank["step"]) for rank in rest} == {(EPOCHS, EPOCHS * BATCHES)}
    assert [list(rank["losses"]) for rank in rest] == [[(1, 1), (1, 2)]] * after
    if case in DRAW_NOTHING:
        expected = {key: means(both)[key] for key in rest[0]["losses"]}
        assert means(rest) == pytest.approx(expected, rel=1e-4)
        assert_same(rest[0]["weights"], both[0]["weights"], rtol=1e-3, atol=1e-5)


def test_accumulated_gradients(tmp_path, images):
    parts = {"accumulate_grad_batches": 2, **sharded(2)}
    once = train(tmp_path, images, "SViTE, heads and units", 2, name="once", **sharded(2))
    halves = train(tmp_path, images, "SViTE, heads and units", 2, name="halves", joint=4, **parts)
    assert halves[0]["step"] == once[0]["step"]
    assert_same(halves[0]["masks"][-1], once[0]["masks"][-1])
    assert_same(halves[0]["weights"], once[0]["weights"], rtol=1e-3, atol=1e-5)


MONITORS = [
    {"class_path": f"tdm_lightning.callbacks.{name}"}
    for name in ("FLOPsMonitor", "DiversityMonitor", "TokenVisualizer")
]


@pytest.mark.parametrize("case", ["TDM", "SViTE, heads and units", "IARED2"])
def test_monitors_and_evaluation(tmp_path, images, case):
    settings = {"callbacks": MONITORS, "default_root_dir": "out"}
    args = arguments(tmp_path, images, case, 2, **settings)
    addon = ["--config=addons/fsdp2", "--trainer.strategy.data_parallel_size=2"]
    saved = f"--model.weights={tmp_path / 'model.ckpt'}"

    def run():
        cli = main([*args, *addon])
        trainer, module = cli.trainer, cli.model
        (fitted,) = trainer.validate(module, cli.datamodule, verbose=False)
        trainer.save_checkpoint("model.ckpt")
        alone = main(["validate", *args[1:], saved, "--trainer.strategy=auto"])
        found = {name: value.item() for name, value in alone.trainer.callback_metrics.items()}
        for name, value in fitted.items():
            if name.startswith("val/"):
                assert value == pytest.approx(found[name], abs=0.02), name
        assert trainer.callback_metrics["flops/gmacs"] > 0

    on_nodes(tmp_path, run)
    assert list((tmp_path / "out").rglob("tokens/*.png"))


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("TDM", sharded(1, split=2), "no tensor parallelism.*data_parallel_size=2 and"),
        ("TDM, averaged", sharded(2), "EMAWeightAveraging averages whole weights.*strategy=ddp"),
        ("TDM", {"strategy": "fsdp"}, "strategy"),
    ],
    ids=["tensor parallelism", "moving average", "FSDP1 without a GPU"],
)
def test_what_cannot_be_sharded(tmp_path, images, case, settings, message):
    args = arguments(tmp_path, images, case, 2, **settings)
    with pytest.raises(AssertionError, match=f"SettingError: .*{message}"):
        on_nodes(tmp_path, partial(fit, "run", args))


def test_fsdp1():
    module = TokenReductionClassifier("test_vit", num_classes=3)
    module._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="flattens the parameters.*addons/fsdp2"):
        module.setup("fit")
