"""What is exported sums by products, and gives what scattering gives."""

import pytest
import torch

from tdm_lightning.ops import cluster_density_peaks, combine, first_members, ward_groups
from tdm_lightning.ops.sums import (
    add_at,
    add_at_,
    group_extremes,
    group_totals,
    row_totals,
    running_totals,
)
from tdm_lightning.vit.adapters.attention import pooled_map

GROUP = torch.tensor([[0, 2, 0, 1, 2], [4, 4, 1, 1, 0]])  # group 3 is empty
PLACE = torch.tensor([[3, 0], [1, 2]])


def in_place(x):
    view = x[:, ::2]
    add_at_(view, torch.tensor([[2, 0], [0, 1]]), torch.tensor([[5, 7], [9, 1]]))
    return x


CASES = {
    "totals": lambda: group_totals(torch.randn(2, 5), GROUP, 5),
    "counts": lambda: group_totals(torch.ones_like(GROUP), GROUP, 5),
    "several totals": lambda: group_totals(torch.randn(2, 3, 5), GROUP, 5),
    "least": lambda: group_extremes(torch.randint(9, (2, 5)), GROUP, 5, "amin", 9),
    "largest": lambda: group_extremes(torch.rand(2, 5), GROUP, 5, "amax", 0),
    "rows": lambda: row_totals(torch.randn(10, 2, 3), rows(), 2, 5),
    "columns": lambda: row_totals(torch.randn(2, 10), rows(), 2, 5, dim=1),
    "numbers": lambda: row_totals(torch.arange(10), rows(), 2, 5),
    "added": lambda: add_at(torch.randn(2, 5), PLACE, torch.randn(2, 2)),
    "added in place": lambda: in_place(torch.arange(10).view(2, 5)),
    "running": lambda: running_totals(GROUP > 1),
    "combine": lambda: combine(
        torch.randn(2, 5, 3), GROUP.where(GROUP < 4, -1), torch.rand(2, 5), torch.ones(2, 5), 4
    ),
    "first members": lambda: first_members(GROUP, 5, torch.rand(2, 5).argsort(dim=1)),
    "pooled map": lambda: pooled_map(torch.rand(2, 3, 5, 5), GROUP, torch.rand(2, 5), 5),
    "ward": lambda: ward_groups(torch.randn(2, 16, 4), torch.ones(2, 16), 5, 3),
    "clusters": lambda: cluster_density_peaks(torch.randn(2, 16, 4), 5),
}


def rows():
    return (GROUP + torch.tensor([[0], [5]])).flatten()


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same(name, monkeypatch):
    torch.manual_seed(1)
    scattered = CASES[name]()
    torch.manual_seed(1)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(CASES[name](), scattered)
