"""What every kind of weight sparsity has in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdm_lightning.core.configurable import Configurable
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.shards import local, local_part
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.sparsity.exchange import draw


class Sparsity(nn.Module, Configurable):
    """Masks on the weights of a timm ViT, kept as buffers, and the rule by which they move.

    The timm model is handed to each method and never kept. Subclasses store every ``__init__``
    argument under its own name.

    Attributes:
        in_force: buffer, bool: whether the masks have been applied to the weights.
    """

    in_force: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_force", torch.tensor(False, device="cpu"))

    def bind(self, vit: Any, generator: torch.Generator) -> None:
        """Draw masks that fit a timm model; those that fit already stay."""
        raise TypeError(f"{type(self).__name__} must override bind()")

    def masked(self, vit: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The weights under masks, and their masks, bool, broadcast to the weight's shape."""
        raise TypeError(f"{type(self).__name__} must override masked()")

    def adopt(self, vit: Any) -> None:
        """Read the masks off weights that are sparse already."""
        raise TypeError(f"{type(self).__name__} must override adopt()")

    def correct(self, index: int, vit: Any, tokens: Tokens, seen: Seen) -> Seen:
        """What block ``index`` shows of its attention, as the model shows it that has only the
        active weights.
        """
        return seen

    def probe(self, vit: Any, generator: torch.Generator) -> None:
        """Before the step of an exchange: give inactive parts a gradient to be judged by. No output
        may change.
        """

    def watch(self, vit: Any) -> list[RemovableHandle]:
        """Before the passes of that step: hooks that gather what :meth:`exchange` decides by, to be
        removed after the pass.
        """
        return []

    def exchange(self, vit: Any, rate: float, generator: torch.Generator) -> None:
        """After that step, gradients still there: move the masks.

        Args:
            vit: the timm model, its inactive weights at zero.
            rate: share of the active parts to remove.
            generator: in the state in which :meth:`probe` got it.
        """
        raise TypeError(f"{type(self).__name__} must override exchange()")

    @torch.no_grad()
    def enforce(self, vit: Any) -> None:
        """Set the inactive weights to zero."""
        for weight, mask in self.masked(vit):
            inactive = local_part(~mask.to(weight.device).expand_as(weight), weight)
            local(weight).masked_fill_(inactive, 0)
        self.in_force.fill_(True)

    @torch.no_grad()
    def enforced(self, vit: Any) -> bool:
        """Whether all inactive weights are zero."""
        return all(bool((weight == 0).logical_or(mask).all()) for weight, mask in self.masked(vit))

    def inactive(self, vit: Any) -> int:
        """Number of inactive weights."""
        return sum(
            weight.numel() - int(mask.expand_as(weight).sum()) for weight, mask in self.masked(vit)
        )

    def _hold(
        self,
        name: str,
        weight: Tensor,
        shape: Iterable[int],
        count: int,
        generator: torch.Generator,
    ) -> None:
        """Keep a random mask for a weight as the buffer ``name``, unless one of this shape is
        there.
        """
        size, held = torch.Size(shape), self._buffers.get(name)
        # Weights without storage are only counted, and that needs the masks' values.
        device = "cpu" if weight.is_meta else weight.device
        self.in_force = self.in_force.to(device)
        if held is None or held.shape != size:
            self.register_buffer(name, draw(size.numel(), count, generator).view(size).to(device))


def gradient(weight: nn.Parameter, what: str) -> Tensor:
    """A weight's gradient after a training step.

    Raises:
        ValueError: if there is none.
    """
    if weight.grad is None:
        raise SettingError(
            f"an exchange of masks goes by gradients, and {what} has none: call"
            " after_optimizer_step() before the gradients are cleared, and leave the weights under"
            " masks trainable"
        )
    return weight.grad
