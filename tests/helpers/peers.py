"""Methods against records of their official code: same outputs, same decisions."""

from __future__ import annotations

import torch
from torch import Tensor


def same_groups(found: Tensor, expected: Tensor) -> bool:
    """Whether two numberings of the groups of N patches, B×N, name the same groups."""
    return torch.equal(first_of_group(found), first_of_group(expected))


def first_of_group(group: Tensor) -> Tensor:
    """The first patch that is in the group of each one, B×N; -1 stays."""
    same = group.unsqueeze(2) == group.unsqueeze(1)
    return torch.where(group < 0, -1, same.int().argmax(dim=2))


@torch.no_grad()
def check_against_official(record) -> None:
    """Logits to 1e-4, and the groups of the patches after every block of the record.

    Args:
        record: facts, tensors and model of a golden case, from the fixture ``official``.
    """
    _, tensors, model = record
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    expected = {int(key[7:]): tensors[key] for key in tensors if key.startswith("source.")}
    found = {layer.index: layer.assignment for layer in output.trace.layers}
    assert found.keys() <= expected.keys()
    held = torch.arange(next(iter(expected.values())).shape[1]).expand(len(output.logits), -1)
    for index, holders in sorted(expected.items()):
        held = found.get(index, held)
        assert same_groups(held, holders.long()), index
