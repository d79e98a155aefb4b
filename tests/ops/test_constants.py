"""Tensors that are made once, and where they must not be."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tdm_lightning.ops import constants
from tdm_lightning.ops.constants import constant, places, rows


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(constants, "_kept", {})


def test_made_once():
    made = []
    x = torch.ones(1)

    def make():
        made.append(1)
        return torch.zeros(3)

    assert constant(make, x, "a") is constant(make, x, "a")
    assert constant(make, x, "b") is not constant(make, x, "a")
    assert len(made) == 2


def test_what_inference_made_serves_training():
    with torch.inference_mode():
        kept = places(3, torch.ones(1))
    assert not kept.is_inference()
    x = torch.randn(3, requires_grad=True)
    x[places(3, x)].sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_not_where_there_are_no_numbers():
    assert places(3, torch.ones(1, device="meta")).is_meta
    with FakeTensorMode() as mode:
        fake = torch.ones(2, 3)
        assert rows(2, 3, fake).fake_mode is mode
    assert not constants._kept
    assert rows(2, 3, torch.ones(1)).tolist() == [[0], [3]]


def test_a_traced_graph_keeps_none_of_them():
    def positions(x):
        return x + rows(x.shape[0], 4, x)

    torch.jit.trace(positions, torch.zeros(2, 4, dtype=torch.int64), check_trace=False)
    assert not constants._kept


def test_compiled_graphs_make_their_own():
    found = torch.compile(lambda x: x + places(3, x), backend="eager", fullgraph=True)
    assert found(torch.zeros(3)).tolist() == [0, 1, 2]
    assert not constants._kept


def test_so_many_at_most(monkeypatch):
    monkeypatch.setattr(constants, "_MOST", 4)
    for n in range(10):
        places(n, torch.ones(1))
    assert len(constants._kept) <= 4
