"""SViTE: the network's own weights are sparse, and which of them are there is learned along."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tdm_lightning.core.checks import check_count, check_fraction
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.shards import whole
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.schedules import SearchSpace
from tdm_lightning.sparsity import Sparsity, Structured, death_rate
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.objective import TrainingObjective


class SViTE(Strategy, TrainingObjective):
    """Trains a sparse ViT: masked weights stay at zero, and every so often some parts make room for
    others.

    Chen et al., NeurIPS 2021; ``VITA-Group/SViTE``. All tokens stay, so it stands beside a
    token-reduction method: ``attach(vit, [SViTE(), TDM()])``. The paper's token selector is not
    part of it.

    After every optimizer step the masked weights are set to zero. After every ``interval``-th,
    while less than ``until`` of the run is done, the masks exchange a share of the active parts, a
    cosine from ``death_rate`` down to ``final_death_rate``.

    Attaching changes no weight: the timm model may be shared. The masks come into force when
    training starts (the first :meth:`on_progress`), and not before does the model compute with
    less; :func:`tdm_lightning.sparsity.apply_masks` does it at once. They are buffers, so
    checkpoints hold them, and resuming gives what an uninterrupted run gives. All randomness comes
    from the seed and the step, and all decisions from weights and gradients that processes share
    (gradients as ``DistributedDataParallel`` leaves them, the heads' scores summed here), so all
    processes hold the same masks.

    The model trains at its full cost. What it costs afterwards is that of
    :func:`tdm_lightning.sparsity.extract_dense`, which takes masked heads and units out;
    :func:`tdm_lightning.flops.count_macs` counts that. A stacked method sees the attention of the
    active heads only.

    Args:
        masks: what is masked and how it is exchanged: heads and MLP units
            (:class:`~tdm_lightning.sparsity.Structured`, S²ViTE) or single weights
            (:class:`~tdm_lightning.sparsity.Unstructured`); ``None``: S²ViTE-Tiny's 70 % of heads
            and units.
        interval: optimizer steps from one exchange to the next; the official 15,000 are for 600
            epochs in batches of 512.
        death_rate: share of the active parts that an exchange at the start of the run would remove,
            in (0, 1].
        final_death_rate: the same at its end.
        until: share of the run after which masks stay as they are, in (0, 1].
        seed: of the first masks and of what comes in.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    keeps_tokens = True

    def __init__(
        self,
        masks: Sparsity | None = None,
        interval: int = 15_000,
        death_rate: float = 0.5,
        final_death_rate: float = 0.005,
        until: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if masks is not None and not isinstance(masks, Sparsity):
            raise SettingTypeError(
                f"masks must be Structured(…), Unstructured(…) or None, got {masks!r}"
            )
        self.masks = Structured() if masks is None else masks
        self.interval = check_count(interval, "interval")
        self.death_rate = check_fraction(death_rate, "death_rate")
        self.final_death_rate = check_fraction(final_death_rate, "final_death_rate")
        self.until = check_fraction(until, "until")
        self.seed = check_count(seed, "seed", least=0)
        self._vit: tuple[
            Any, ...
        ] = ()  # in a tuple, so that it is no part of the strategy and its state
        self._started = False
        self._exchanging = False
        self._watching: list[RemovableHandle] = []

    def bind(self, vit: Any, info: ModelInfo) -> None:
        """Draw the first masks.

        Raises:
            TypeError: if the model has no layers that these masks fit.
            ValueError: if a density leaves no head or no unit, or the strategy is attached already.
        """
        if self._vit:
            raise SettingError(
                "this SViTE is attached already and owns masks; make a new one for another model"
            )
        self.masks.bind(vit, self._generator(0))
        self._vit = (vit,)

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """The share of heads and MLP units that is active, in thousandths; single weights cost what
        all of them cost.
        """
        if not isinstance(self.masks, Structured):
            return None
        return SearchSpace(
            1000,
            lambda step: self.changed(masks=Structured(step / 1000, step / 1000).config()),
        )

    def reset_classifier(self, num_classes: int) -> None:
        """Masks for the new classifier, where it has some."""
        self.masks.bind(self._vit[0], self._generator(0))

    def on_progress(self, epoch: int, step: int, total_steps: int) -> None:
        """Bring the masks into force, and prepare for an exchange where the coming step ends in
        one.
        """
        (vit,) = self._vit
        if not self._started:
            self.masks.enforce(vit)
            self._started = True
        exchanging = self._exchanges_after(step + 1, total_steps)
        if (
            exchanging and not self._exchanging
        ):  # once, where gradients of several batches accumulate
            with whole(vit, write=True):
                self.masks.probe(vit, self._generator(step + 1))
        self._exchanging = exchanging

    def begin(self, tokens: Tokens) -> Tokens:
        """Watch the heads in the passes that an exchange goes by, and in no other."""
        self._unwatch()
        if self._exchanging and self.training:
            self._watching = self.masks.watch(self._vit[0])
        return tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """Leave nothing on the model."""
        self._unwatch()
        return tokens

    def spares_class_tokens(self) -> bool:
        """See :class:`~tdm_lightning.Strategy`: it acts on weights alone. What an exchange goes by
        is summed over all tokens.
        """
        return not (self._exchanging and self.training) and self.keeps_hooks_of(SViTE)

    def correct(self, index: int, tokens: Tokens, seen: Seen) -> Seen:
        """What stacked methods see of the attention, without its masked heads."""
        return self.masks.correct(index, self._vit[0], tokens, seen)

    def after_optimizer_step(self, model: Any, step: int, total_steps: int) -> None:
        """Hold the masked weights at zero; exchange where it is time."""
        self._unwatch()
        self._exchanging = False
        self.masks.enforce(model.vit)
        if self._exchanges_after(step, total_steps):
            rate = death_rate(step, total_steps, self.death_rate, self.final_death_rate)
            with whole(model.vit, write=True):
                self.masks.exchange(model.vit, rate, self._generator(step))
            self.masks.enforce(model.vit)

    def _exchanges_after(self, step: int, total_steps: int) -> bool:
        return step % self.interval == 0 and step < self.until * total_steps

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def _unwatch(self) -> None:
        while self._watching:
            self._watching.pop().remove()
