"""Single weights come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.checks import check_fraction
from tdm_lightning.sparsity.base import Sparsity, gradient
from tdm_lightning.sparsity.density import erk_densities
from tdm_lightning.sparsity.exchange import exchange


class Unstructured(Sparsity):
    """Masks single weights of every matrix and convolution: SViTE, whose scripts keep 40 or 50 % of
    them.

    Layers get Erdős–Rényi-kernel densities. An exchange removes the smallest weights and lets
    in those with the largest gradients, the removed ones among the candidates (RigL; Evci et al.,
    2020); what comes in starts at zero. Biases, norms, positions and class token stay whole.

    Args:
        density: share of these weights that is active, in (0, 1].

    Raises:
        TypeError, ValueError: if the density is no number or out of range.
    """

    def __init__(self, density: float = 0.4) -> None:
        super().__init__()
        self.density = check_fraction(density, "density")

    def bind(self, vit: Any, generator: torch.Generator) -> None:
        """See :meth:`Sparsity.bind`."""
        weights = dict(_weights(vit))
        shares = erk_densities([weight.shape for weight in weights.values()], self.density)
        for (name, weight), share in zip(weights.items(), shares, strict=True):
            self._hold(
                _key(name), weight, weight.shape, max(1, round(share * weight.numel())), generator
            )
        for stale in set(self._buffers) - {"in_force", *map(_key, weights)}:
            delattr(self, stale)

    def masked(self, vit: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """See :meth:`Sparsity.masked`."""
        return ((weight, self.get_buffer(_key(name))) for name, weight in _weights(vit))

    def adopt(self, vit: Any) -> None:
        """See :meth:`Sparsity.adopt`."""
        for weight, mask in self.masked(vit):
            mask.copy_(weight != 0)
        self.in_force.fill_(True)

    @torch.no_grad()
    def exchange(self, vit: Any, rate: float, generator: torch.Generator) -> None:
        """See :meth:`Sparsity.exchange`."""
        for name, weight in _weights(vit):
            mask = self.get_buffer(_key(name))
            worth, promise = weight.abs().flatten(), gradient(weight, name).abs().flatten()
            mask.copy_(exchange(mask.flatten(), worth, promise, rate, readmit=True).view_as(mask))


def _weights(vit: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return (
        (name, weight)
        for name, weight in vit.named_parameters()
        if name.endswith("weight") and weight.ndim in (2, 4)
    )


def _key(name: str) -> str:
    """A parameter's name as a buffer may be called."""
    return name.replace(".", "-")
