"""Random numbers that follow from where training stands, so that a resumed run draws what an
uninterrupted one would.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def given_seed() -> int | None:
    """The seed that Lightning's ``seed_everything`` was given; ``None`` where it was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def run_seed() -> int:
    """The seed of the run, the same in all of its processes: Lightning's, else the one of
    ``torch.manual_seed``.
    """
    seed = given_seed()
    return torch.initial_seed() if seed is None else seed


def reseed(*key: int) -> None:
    """Let Python's, NumPy's and torch's random numbers, on all devices, follow from some whole
    numbers from 0.

    >>> reseed(1, 2)
    >>> first = torch.rand(()), random.random()
    >>> reseed(1, 2)
    >>> first == (torch.rand(()), random.random())
    True
    """
    torch.manual_seed(_on_the_host(key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """As :func:`reseed`, for what runs inside, and on the CPU alone; afterwards the random numbers
    go on as if nothing was.

    >>> with seeded(3):
    ...     first = torch.rand(())
    >>> with seeded(3):
    ...     first == torch.rand(())
    tensor(True)
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - as below
    with torch.random.fork_rng(devices=[]):  # workers that were forked cannot touch CUDA
        torch.default_generator.manual_seed(_on_the_host(key))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _on_the_host(key: tuple[int, ...]) -> int:
    """Seed Python and NumPy; gives the seed for torch."""
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002 - timm draws from the global state
    return third
