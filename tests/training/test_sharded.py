"""Parameters in shards over two nodes (FSDP2): the same steps as DDP's, for every method that has a
state of its own; and what cannot be sharded is refused.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
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
    start,
    train,
)
from tests.helpers.localsets import make_arrow
from tests.helpers.nodes import needs_fork, on_nodes

slow = [pytest.mark.slow, needs_fork]
SHARDED = {"strategy": "ModelParallelStrategy"}


def sharded(processes, folders=False, split=1):
    settings = {
        "data_parallel_size": processes,
        "tensor_parallel_size": split,
        "save_distributed_checkpoint": folders,
    }
    return {"strategy": {"class_path": "ModelParallelStrategy", "init_args": settings}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=IMAGES // 3, size=24))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("case", [case for case in CASES if AVERAGE not in CASES[case][1]])
def test_shards_make_the_steps_of_whole_parameters(tmp_path, images, case):
    start(tmp_path)
    whole = train(tmp_path, images, case, 2, name="whole")
    parts = train(tmp_path, images, case, 2, name="parts", **sharded(2))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["rates"] == theirs["rates"]
        assert ours["stage"] == theirs["stage"]
        assert_same(ours["teacher"], theirs["teacher"])
        for mask, expected in zip(ours["masks"], theirs["masks"], strict=True):
            assert_same(mask, expected)
        assert_same(ours["weights"], theirs["weights"], rtol=1e-3, atol=1e-5)
    # Whole again in one process, in the middle of an epoch.
    rest = train(tmp_path, images, case, 1, "--ckpt_path=kept/4.ckpt", name="rest")
    assert (rest[0]["epoch"], rest[0]["step"]) == (EPOCHS, EPOCHS * BATCHES)
    if case in DRAW_NOTHING:
        expected = means(parts)
        expected = {key: expected[key] for key in rest[0]["losses"]}
        assert means(rest) == pytest.approx(expected, rel=1e-4)
        assert_same(rest[0]["weights"], parts[0]["weights"], rtol=1e-3, atol=1e-5)
