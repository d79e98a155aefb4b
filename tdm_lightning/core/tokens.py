"""The tokens between two steps of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.positions import Positions
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.core.trace import History, LayerTrace
from tdm_lightning.errors import SettingTypeError
from tdm_lightning.ops import gather_tokens, group_totals, pack

#: Added to the logits of keys that nobody may attend to. Finite in half precision too, because an
#: image may have no other keys.
_UNSEEN = -1e4


@dataclass(frozen=True)
class Padding:
    """Sequences of different lengths in one batch.

    Attributes:
        valid: B×T, bool: False where a row only pads an image that has fewer tokens than others;
            ``None``: all are tokens.
        images: B, int64, which images of the full batch the rows belong to, once some have left it;
            ``None``: all of them.
    """

    valid: Tensor | None = None
    images: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """The tokens between two steps of a block.

    Immutable: a step returns a new one, so nothing of a pass stays behind.

    Attributes:
        x: B×T×C, prefix tokens first.
        prefix: number of prefix tokens: class, distillation, registers, and what a strategy lets
            run with them for a while.
        info: the model that they run through, ``info.patches`` being that of these images.
        size: B×(T-prefix), patches each token stands for; ``None`` where nothing asks for it.
        positions: where tokens stand; ``None`` where neither the model's blocks nor a strategy ask.
        key_bias: added to the attention logits, broadcast to B×H×T×T.
        policy: B×T, differentiable: how far each token may be attended to; selects the explicit
            attention of :func:`~tdm_lightning.ops.policy_softmax`.
        padding: which rows and images are there; ``None``: all.
        history: what became of the patches; only while tracing.
        state: the strategy's own state in this pass, a dataclass of its own.
    """

    x: Tensor
    prefix: int
    info: ModelInfo
    size: Tensor | None = None
    positions: Positions | None = None
    key_bias: Tensor | None = None
    policy: Tensor | None = None
    padding: Padding | None = None
    history: History | None = None
    state: Any = None

    @property
    def patches(self) -> Tensor:
        """The tokens behind the prefix, B×N×C."""
        return self.x[:, self.prefix :]

    @property
    def count(self) -> int:
        """Number of patch tokens N."""
        return self.x.shape[1] - self.prefix

    @property
    def valid(self) -> Tensor | None:
        """Which rows are tokens and no padding, B×T, bool; ``None``: all."""
        return None if self.padding is None else self.padding.valid

    @property
    def images(self) -> Tensor | None:
        """Which images of the full batch are left, B, int64; ``None``: all."""
        return None if self.padding is None else self.padding.images

    @property
    def valid_patches(self) -> Tensor:
        """Which patch tokens are no padding, B×N, bool."""
        if self.valid is None:
            return torch.ones(self.patches.shape[:2], dtype=torch.bool, device=self.x.device)
        return self.valid[:, self.prefix :]

    def replace(self, **changes: Any) -> Tokens:
        """A copy with some fields changed.

        Raises:
            TypeError: for a field that there is not.
        """
        if unknown := changes.keys() - _FIELDS:
            raise SettingTypeError(
                f"Tokens has no field {', '.join(sorted(unknown))}; it has {', '.join(_ORDER)}."
                " What a strategy notes for itself goes into a dataclass of its own, in state"
            )
        if torch.compiler.is_compiling():  # older tracers do not follow what comes below
            return Tokens(**{name: changes.get(name, getattr(self, name)) for name in _ORDER})
        # Many times in every block: dataclasses.replace takes six times as long, which one image
        # alone feels.
        copy = object.__new__(Tokens)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def seen(self) -> Seen:
        """The patch tokens as a merger sees them before a block, where no attention tells more."""
        return Seen(self.patches, self.size, prefix=self.prefix)

    def with_size_bias(self) -> Tokens:
        """Proportional attention: ``log(size)`` added to the logits of every key (Bolya et al.,
        2023, eq. 1).
        """
        assert self.size is not None
        length = self.prefix + self.size.shape[1]
        # A GPU's fused kernels want rows of a multiple of 8.
        more = 0 if self.x.device.type == "cpu" else -length % 8
        bias = pad(self.size.log(), (self.prefix, more)).to(self.x.dtype)
        return self.replace(key_bias=bias[:, None, None, :length])

    def reduced(self, index: int, reduction: Reduction, importance: Tensor | None = None) -> Tokens:
        """The tokens after block ``index`` replaced its patch tokens; sizes, positions and history
        follow along.

        Args:
            index: the block.
            reduction: what it made of the N patch tokens.
            importance: the scores that it decided by, B×N.
        """
        changes: dict[str, Any] = {"x": torch.cat((self.x[:, : self.prefix], reduction.x), dim=1)}
        positions = self.positions
        if positions is None and reduction.position is not None:
            positions = Positions()
        if positions is not None:
            changes["positions"] = positions.after(reduction, importance, self.size)
        if self.size is not None:
            given = reduction.size
            changes["size"] = reduction.totals(self.size) if given is None else given
        if self.history is not None:
            changes["history"] = self._noted(self.history, index, reduction, importance)
        return self.replace(**changes)

    def _noted(
        self, history: History, index: int, reduction: Reduction, importance: Tensor | None
    ) -> History:
        source, layers = history.source, history.layers
        assignment = self.full_batch(reduction.assignment, -1)
        fate = self.full_batch(reduction.role, int(Role.DROPPED))
        # What is gone stays so: it reads one slot more, at the end.
        slot = torch.where(source < 0, assignment.shape[1], source)
        source = pad(assignment, (0, 1), value=-1).gather(1, slot)
        role = pad(fate, (0, 1), value=int(Role.DROPPED)).gather(1, slot)
        scores = None if importance is None else self.full_batch(importance.detach())
        return History(source, (*layers, LayerTrace(index, scores, source, role)))

    # Batches in which every image keeps its own number of tokens

    def packed(
        self,
        index: int,
        kept: Tensor,
        importance: Tensor | None = None,
        joins: Tensor | None = None,
    ) -> Tokens:
        """The tokens after every image kept its own choice of patch tokens; the others are gone, or
        live on in kept ones.

        Images that kept fewer than the longest are padded; padding is masked out of the attention
        and stands for no patch.

        Args:
            index: the block.
            kept: B×N, bool; padding is never kept.
            importance: B×N, for the trace.
            joins: the kept token that each token has been combined into, itself where it is kept,
                B×N, int64; ``None``: what is not kept is gone.
        """
        present = self.valid_patches
        kept = kept & present
        order, valid = pack(kept)
        x = gather_tokens(self.patches, order)
        if not bool(valid.all()):
            x = x.masked_fill(~valid.unsqueeze(-1), 0)
        slot = kept.cumsum(dim=1) - 1
        if joins is None:
            assignment = torch.where(kept, slot, -1)
            role = torch.where(kept, int(Role.KEPT), int(Role.DROPPED))
        else:
            assignment = torch.where(present, slot.gather(1, joins), -1)
            members = group_totals(present.long(), joins, joins.shape[1])
            shared = torch.where(members.gather(1, joins) > 1, int(Role.MATCHED), int(Role.KEPT))
            role = torch.where(present, shared, int(Role.DROPPED))
        position = order if joins is None else None
        reduction = Reduction(x, assignment, role, position=position)
        tokens = self.reduced(index, reduction, importance)
        if self.valid is None:
            return tokens.masked(pad(valid, (self.prefix, 0), value=True))
        return tokens.masked(torch.cat((self.valid[:, : self.prefix], valid), dim=1))

    def masked(self, valid: Tensor) -> Tokens:
        """The tokens with padding, B×T bool, masked out of the attention.

        Takes the place of any other key bias.
        """
        if bool(valid.all()):  # nothing to mask, so the fastest attention kernel
            return self.replace(padding=Padding(None, self.images), key_bias=None)
        bias = torch.zeros(valid.shape, dtype=self.x.dtype, device=self.x.device)
        bias = bias.masked_fill(~valid, _UNSEEN)
        return self.replace(padding=Padding(valid, self.images), key_bias=bias[:, None, None, :])

    def staying(self, stay: Tensor) -> Tokens:
        """The tokens of some of the images, B, bool; the others leave the batch."""
        index = stay.nonzero().flatten()

        def rows(value: Tensor | None) -> Tensor | None:
            if value is None or len(value) != len(stay):  # one bias may serve all images
                return value
            return value.index_select(0, index)

        names = ("x", "size", "key_bias", "policy")
        changes: dict[str, Any] = {name: rows(getattr(self, name)) for name in names}
        if self.positions is not None:
            tables = self.positions
            changes["positions"] = Positions(
                tables.rope, tables.bias, tables.columns, rows(tables.index)
            )
        images = self.images
        if images is None:
            images = torch.arange(len(stay), device=stay.device)
        if self.history is not None:
            source = self.history.source.index_fill(0, images[~stay], -1)
            changes["history"] = History(source, self.history.layers)
        return self.replace(padding=Padding(rows(self.valid), images[stay]), **changes)

    def full_batch(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the present images, B×…, for the full batch: ``fill`` for images that left.

        Only while tracing.
        """
        if self.images is None:
            return values
        assert self.history is not None
        shape = (self.history.source.shape[0], *values.shape[1:])
        return values.new_full(shape, fill).index_copy(0, self.images, values)


_ORDER = Tokens.__match_args__
_FIELDS = frozenset(_ORDER)
