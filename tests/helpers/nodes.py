"""Several machines on the loopback: a process each, with the environment that torchrun or SLURM
gives.
"""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

#: Of tests that start processes; by fork, so that each need not import everything again.
needs_fork = pytest.mark.skipif(
    "fork" not in torch.multiprocessing.get_all_start_methods(),
    reason="needs fork, to start quickly",
)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def torchrun(rank: int, nodes: int) -> dict[str, str]:
    """What it tells the process of a node."""
    known = {"WORLD_SIZE": nodes, "RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0}
    known |= {"LOCAL_WORLD_SIZE": 1}
    return {"TORCHELASTIC_RUN_ID": "test", **{name: str(value) for name, value in known.items()}}


def slurm(rank: int, nodes: int) -> dict[str, str]:
    """What ``srun`` tells it in a job of a task per node."""
    known = {"NTASKS": nodes, "NTASKS_PER_NODE": 1, "NNODES": nodes, "JOB_ID": 77}
    known |= {"PROCID": rank, "NODEID": rank, "LOCALID": 0}
    names = {"SLURM_JOB_NAME": "tdm", "SLURM_JOB_NODELIST": "127.0.0.1"}
    return names | {f"SLURM_{name}": str(value) for name, value in known.items()}


def on_nodes(
    folder: Path,
    function: Callable[[], object],
    nodes: int = 2,
    seconds: int = 240,
    environment: Callable[[int, int], dict[str, str]] = torchrun,
) -> None:
    """Call a function in a process on each node, in a folder; raise what went wrong there.

    A process that does not end in time is stopped and counts as hung.
    """
    port = free_port()
    context = torch.multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_node, args=(folder, function, rank, environment(rank, nodes), port))
        for rank in range(nodes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    failed = [path.read_text() for path in sorted(folder.glob("failed_*.txt"))]
    assert not failed, "\n".join(failed)
    assert not hung, f"{len(hung)} of {nodes} processes did not end within {seconds} s"
    assert [process.exitcode for process in processes] == [0] * nodes


def _node(
    folder: Path, function: Callable[[], object], rank: int, environment: dict[str, str], port: int
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        function()
    except BaseException:
        (folder / f"failed_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # nothing of pytest runs twice
