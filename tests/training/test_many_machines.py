"""Training on two nodes of the loopback: `tdm fit` under DDP, with every method that has a state of
its own; and going on with another number of processes.
"""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from tdm_lightning import TokenReductionClassifier
from tdm_lightning.cli import main
from tests.helpers.fits import (
    BATCHES,
    CASES,
    DRAW_NOTHING,
    EPOCHS,
    IMAGES,
    JOINT,
    WARMUP,
    arguments,
    assert_same,
    fit,
    means,
    seen_in,
    sharded,
    start,
    train,
)
from tests.helpers.localsets import make_arrow, make_table
from tests.helpers.nodes import free_port, needs_fork, on_nodes, slurm

pytestmark = [pytest.mark.slow, needs_fork]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=IMAGES // 3, size=24))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """A folder with the run of a case on some nodes, and what its processes noted; made once."""
    made = {}

    def run(case, nodes):
        if (case, nodes) not in made:
            folder = tmp_path_factory.mktemp("run")
            start(folder)
            made[case, nodes] = folder, train(folder, images, case, nodes)
        return made[case, nodes]

    return run


@pytest.mark.parametrize("case", CASES)
def test_two_nodes_agree(runs, case):
    folder, (first, second) = runs(case, 2)
    assert first["losses"] != second["losses"]
    assert first["step"] == second["step"] == EPOCHS * BATCHES
    assert_same(first["weights"], second["weights"])
    for ours, theirs in zip(first["masks"], second["masks"], strict=True):
        assert_same(ours, theirs)
    assert first["rates"] == second["rates"]
    for epoch in range(EPOCHS):
        assert len(set(seen_in([first, second], epoch))) == IMAGES
    if case.startswith("SViTE"):
        assert any(
            not torch.equal(first["masks"][0][key], first["masks"][-1][key])
            for key in first["masks"][0]
        )
    if WARMUP in CASES[case][1]:
        assert first["rates"][0] == 1
        assert first["rates"] == sorted(first["rates"], reverse=True)
        assert 1 > first["rates"][-1] > 0.5
    if case == "IARED2":
        assert first["stage"] == (0, False)
    if case == "DyViT":
        expected = torch.load(folder / "start.ckpt")
        for rank in (first, second):
            assert_same(rank["teacher"], {f"vit.{key}": value for key, value in expected.items()})


@pytest.mark.parametrize("case", DRAW_NOTHING)
def test_two_nodes_make_the_steps_of_one_process_with_the_joint_batch(runs, case):
    _, (alone,) = runs(case, 1)
    _, both = runs(case, 2)
    assert means(both) == pytest.approx(alone["losses"], rel=1e-4)
    assert both[0]["rates"] == alone["rates"]
    for ours, theirs in zip(both[0]["masks"], alone["masks"], strict=True):
        assert_same(ours, theirs)
    assert_same(both[0]["weights"], alone["weights"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("step", [4, 3], ids=["within an epoch", "between epochs"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path, images, runs, case, before, after, step
):
    folder, whole = runs(case, before)
    start(tmp_path)
    rest = train(tmp_path, images, case, after, f"--ckpt_path={folder}/kept/{step}.ckpt")
    assert [list(rank["losses"]) for rank in rest] == [list(whole[0]["losses"])[step:]] * after
    assert {(rank["epoch"], rank["step"]) for rank in rest} == {(EPOCHS, EPOCHS * BATCHES)}
    gone = {
        image for rank in whole for at, image in rank["seen"][: step * JOINT // before] if at == 1
    }
    assert len(gone) == (step - BATCHES) * JOINT
    assert sorted(gone) == sorted(set(seen_in(whole, 1)) - set(seen_in(rest, 1)))
    assert len(seen_in(rest, 1)) == IMAGES - len(gone)
    if case in DRAW_NOTHING:
        expected = means(whole)
        assert means(rest) == pytest.approx(
            {key: expected[key] for key in rest[0]["losses"]}, rel=1e-4
        )
        assert_same(rest[0]["weights"], whole[0]["weights"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("step", [4, 3], ids=["within an epoch", "between epochs"])
def test_another_joint_batch_is_refused(tmp_path, images, runs, step):
    folder, _ = runs("TDM", 2)
    args = arguments(tmp_path, images, "TDM", 1, joint=4)
    with pytest.raises(AssertionError, match=r"hold 4 \(1 × 4\): set data.batch_size so that .* 8"):
        on_nodes(
            tmp_path, partial(fit, "run", [*args, f"--ckpt_path={folder}/kept/{step}.ckpt"]), 1
        )


@pytest.mark.usefixtures("no_wait_for_parquet")
@pytest.mark.parametrize("kind", ["ddp", "FSDP2"])
@pytest.mark.parametrize("case", ["TDM", "SViTE, heads and units"])
def test_a_stream_of_unequal_shards(tmp_path, case, kind):
    sizes, table = (1, 2, 17, 7), make_table(3, 9, 24)
    for split in ("train", "validation"):
        for index in range(len(sizes)):
            shard = table.select(range(sum(sizes[:index]), sum(sizes[: index + 1])))
            shard.to_parquet(tmp_path / f"{split}-{index}.parquet")
    settings = sharded(2) if kind == "FSDP2" else {}
    stream = ["--data.streaming=true", "--trainer.limit_train_batches=3"]
    both = train(tmp_path, str(tmp_path), case, 2, *stream, **settings)
    assert [rank["step"] for rank in both] == [EPOCHS * 3] * 2
    for epoch in range(EPOCHS):
        judged = [len(seen_in([rank], epoch, "judged")) for rank in both]
        assert sum(judged) == len(set(seen_in(both, epoch, "judged"))) == sum(sizes)
        assert judged[0] != judged[1]
    assert_same(both[0]["weights"], both[1]["weights"])


def test_a_job_of_slurm_that_is_requeued_goes_on(tmp_path, images, runs, monkeypatch):
    class Signalled(TokenReductionClassifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 4:
                signal.raise_signal(signal.SIGUSR1)  # what SLURM sends before the time is up
                self.trainer.strategy.barrier()
                os._exit(0)  # and then it ends the job

    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    args = [*arguments(tmp_path, images, "TDM", 2), "--trainer.default_root_dir=job"]
    on_nodes(tmp_path, partial(main, args, model_class=Signalled), environment=slurm)
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert [path.name for path in (tmp_path / "job").glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    on_nodes(tmp_path, partial(fit, "again", args), environment=slurm)
    again = [torch.load(tmp_path / f"again_{rank}of2.pt") for rank in range(2)]
    _, whole = runs("TDM", 2)
    for ours, theirs in zip(again, whole, strict=True):
        assert ours["losses"] == {key: theirs["losses"][key] for key in [(1, 1), (1, 2)]}
        assert_same(ours["weights"], theirs["weights"])


def test_torchrun(tmp_path, images):
    """The command of the documentation, as it stands."""
    args = arguments(tmp_path, images, "TDM", 2, max_epochs=1, callbacks=None)
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), "-m", "tdm_lightning", *args],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "MEMBER: 2/2" in "".join(said)
    assert "`max_epochs=1` reached" in said[0]
