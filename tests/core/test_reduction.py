"""Reductions whose fate is worked out when something asks."""

from dataclasses import replace

import pytest
import torch

from tdm_lightning.core.reduction import Reduction, Role


def lazy():
    asked = []

    def fate():
        asked.append(1)
        group = torch.tensor([[0, 1, 0]])
        return group, torch.full_like(group, int(Role.MATCHED))

    return Reduction.lazily(torch.zeros(1, 2, 4), fate, torch.tensor([[2.0, 1.0]])), asked


def test_asked_once_and_only_where_needed():
    found, asked = lazy()
    assert (found.size.tolist(), found.position) == ([[2.0, 1.0]], None)
    assert (found.settled, asked) == (False, [])
    assert found.role.tolist() == [[1, 1, 1]]
    assert found.assignment.tolist() == [[0, 1, 0]]
    assert found.totals(torch.ones(1, 3)).tolist() == [[2.0, 1.0]]
    assert (found.settled, asked) == (True, [1])


def test_a_changed_copy_is_settled():
    found, _ = lazy()
    copy = replace(found, size=torch.ones(1, 2))
    assert copy.settled
    assert torch.equal(copy.assignment, found.assignment)


def test_other_names_are_missing_as_elsewhere():
    found, _ = lazy()
    with pytest.raises(AttributeError, match="'Reduction' object has no attribute 'group'"):
        found.group  # noqa: B018 - the access is what is tested


def test_compiled_it_is_settled_at_once():
    def use(x):
        found = Reduction.lazily(x[:, :1], lambda: (x[..., 0].long(), x[..., 0].long()))
        return found.x + found.assignment.sum()

    x = torch.ones(1, 2, 3)
    assert torch.equal(torch.compile(use, backend="eager", fullgraph=True)(x), use(x))
