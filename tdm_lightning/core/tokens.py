"""What travels through a reduced transformer, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from tdm_lightning.ops import first_members, gather_tokens, mean_places, pack, rank_order

#: Added to the logits of keys that nobody may attend to. Finite in half precision too, because an
#: image may have no other keys.
_UNSEEN = -1e4


class Role(IntEnum):
    """What a reducing layer did with a patch."""

    KEPT = 0  #: passed on as it is
    MATCHED = 1  #: fused with similar attentive tokens
    CLUSTERED = 2  #: combined with other inattentive tokens
    DROPPED = 3  #: gone
    PARKED = 4  #: waits outside the blocks and comes back


@dataclass(frozen=True)
class Observed:
    """What a block's attention tells a strategy; only what :meth:`Strategy.needs` asked for is
    there.

    Attributes:
        importance: B×N, float32: the attention each patch gets from the class token (or tokens),
            mean over heads; in a model without one, the mean attention from all patches. Not
            renormalised after the prefix is cut off.
        heads: how many heads that is the mean of.
        keys: B×T×d, keys averaged over the heads.
        normed: B×T×C, the tokens after attention under the block's second norm.
    """

    importance: Tensor | None = None
    heads: int = 1
    keys: Tensor | None = None
    normed: Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """The outcome of one reducing layer for N patch tokens.

    Attributes:
        x: the M tokens that leave, B×M×C.
        assignment: the leaving token that now holds each entering one, B×N, int64; -1 where it was
            dropped.
        role: :class:`Role` of each entering token, B×N, int64.
        place: the entering token in whose place each leaving one stands, B×M, int64; ``None``: see
            :meth:`Tokens.reduced`.
    """

    x: Tensor
    assignment: Tensor
    role: Tensor
    place: Tensor | None = None

    def sizes(self, size: Tensor) -> Tensor:
        """Number of patches in each leaving token, B×M, from that of each entering one, B×N."""
        batch, count = self.x.shape[:2]
        holder = torch.where(
            self.assignment < 0, count, self.assignment
        )  # what is dropped goes to one place more
        return size.new_zeros(batch, count + 1).scatter_add(1, holder, size)[:, :count]


@dataclass(frozen=True)
class LayerTrace:
    """What one reducing layer did with every original patch.

    Attributes:
        index: the block, counted from 0.
        importance: B×N_in, the scores it decided by; ``None`` where the method has none.
        assignment: B×N0, int64: the non-prefix output token, in output order, that now holds each
            patch; -1: dropped. Parked tokens are numbered behind those that stay in the blocks.
        role: B×N0, int64, :class:`Role` of each patch.
    """

    index: int
    importance: Tensor | None
    assignment: Tensor
    role: Tensor


@dataclass(frozen=True)
class Trace:
    """What became of every patch.

    Attributes:
        token_counts: patch tokens after each block; where some are parked, those that the block
            updated. For adaptive strategies each entry is a tensor B, one number per image, padding
            not counted.
        layers: one :class:`LayerTrace` per reducing block.
    """

    token_counts: list[Any]
    layers: list[LayerTrace]


@dataclass(frozen=True)
class Geometry:
    """How a model's blocks learn where tokens are, on the grid of all N0 patches; for models with
    more than absolute positions.

    Attributes:
        rope: rotary embeddings, one per block, each N0×D or H×N0×D; empty without RoPE.
        bias: relative position bias that all blocks share, 1×H×T0×T0; each block may add its
            own.
        columns: width of the grid, where merged tokens stand in the middle of their patches, see
            :meth:`Tokens.reduced`.
    """

    rope: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Tokens:
    """The tokens between two steps of a block. Immutable: a step returns a new one, so nothing of a
    pass stays behind.

    Attributes:
        x: B×T×C, prefix tokens first.
        prefix: number of prefix tokens: class, distillation, registers, and what a strategy lets
            run with them for a while.
        depth: number of blocks in the model.
        readout: number of leading tokens that the head reads; ``None``: it pools over patches.
        images: B, int64, which images of the batch the tokens belong to, once some have left it;
            ``None``: all of them.
        size: B×(T-prefix), patches each token stands for; ``None`` where nothing asks for it.
        source: the token of :attr:`held` that holds each original patch, -1 dropped, int64, N0 for
            every image of the whole batch; only while tracing.
        geometry: tables of positions; ``None`` in models whose blocks do not ask where a token is.
        position: B×N, int64, the original patch in whose place each token stands; ``None``: every
            patch still in its own, or nothing asks.
        key_bias: added to the attention logits, broadcast to B×H×T×T.
        policy: B×T, differentiable: how far each token may be attended to; selects the explicit
            attention of :func:`~tdm_lightning.ops.policy_softmax`.
        valid: B×T, bool: False where a row only pads an image that has fewer tokens than others;
            ``None``: all are tokens.
        queries: rows of ``x``, int64, prefix included, that the coming block computes; its
            attention still looks at all rows, and only these leave it. ``None``: all.
        parked: B×P×C, patch tokens that wait outside the blocks.
        layers: what the reducing layers did; only while tracing.
        carry: the strategy's own tensors for this pass.
    """

    x: Tensor
    prefix: int
    depth: int = 0
    readout: int | None = None
    images: Tensor | None = None
    size: Tensor | None = None
    source: Tensor | None = None
    geometry: Geometry | None = None
    position: Tensor | None = None
    key_bias: Tensor | None = None
    policy: Tensor | None = None
    valid: Tensor | None = None
    queries: Tensor | None = None
    parked: Tensor | None = None
    layers: tuple[LayerTrace, ...] = ()
    carry: dict[str, Any] = field(default_factory=dict)

    @property
    def patches(self) -> Tensor:
        """The tokens behind the prefix, B×N×C."""
        return self.x[:, self.prefix :]

    @property
    def count(self) -> int:
        """Number of patch tokens N."""
        return self.x.shape[1] - self.prefix

    @property
    def valid_patches(self) -> Tensor:
        """Which patch tokens are no padding, B×N, bool."""
        if self.valid is None:
            return torch.ones(self.patches.shape[:2], dtype=torch.bool, device=self.x.device)
        return self.valid[:, self.prefix :]

    @property
    def held(self) -> Tensor:
        """All patch tokens there are: those in the blocks, then the parked ones, B×(N+P)×C."""
        return (
            self.patches if self.parked is None else torch.cat((self.patches, self.parked), dim=1)
        )

    def whole(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the present images, B×…, for the whole batch: ``fill`` for images that left.
        Only while tracing.
        """
        if self.images is None:
            return values
        assert self.source is not None
        return values.new_full((self.source.shape[0], *values.shape[1:]), fill).index_copy(
            0, self.images, values
        )

    def replace(self, **changes: Any) -> Tokens:
        """A copy with some fields changed."""
        if (
            torch.compiler.is_compiling()
        ):  # older versions of its tracer do not follow what comes below
            return Tokens(
                **{name: changes.get(name, getattr(self, name)) for name in Tokens.__match_args__}
            )
        # Many times in every block: dataclasses.replace takes six times as long, which one image
        # alone feels.
        copy = object.__new__(Tokens)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def carrying(self, **tensors: Any) -> Tokens:
        """A copy that carries more."""
        return self.replace(carry={**self.carry, **tensors})

    def with_size_bias(self) -> Tokens:
        """Proportional attention: ``log(size)`` added to the logits of every key (Bolya et al.,
        2023, eq. 1).
        """
        assert self.size is not None
        bias = torch.nn.functional.pad(self.size.log(), (self.prefix, 0))
        return self.replace(key_bias=bias[:, None, None, :].to(self.x.dtype))

    def packed(self, index: int, kept: Tensor, importance: Tensor | None = None) -> Tokens:
        """The tokens after every image kept its own choice of patch tokens; the others are gone.

        Images that kept fewer than the longest are padded; padding is masked out of the attention
        and stands for no patch.

        Args:
            index: the block.
            kept: B×N, bool; padding is never kept.
            importance: B×N, for the trace.
        """
        kept = kept & self.valid_patches
        order, valid = pack(kept)
        x = gather_tokens(self.patches, order)
        if not bool(valid.all()):
            x = x.masked_fill(~valid.unsqueeze(-1), 0)
        assignment = torch.where(kept, kept.cumsum(dim=1) - 1, -1)
        role = torch.where(kept, int(Role.KEPT), int(Role.DROPPED))
        tokens = self.reduced(index, Reduction(x, assignment, role, place=order), importance)
        if self.valid is None:
            return tokens.masked(torch.nn.functional.pad(valid, (self.prefix, 0), value=True))
        return tokens.masked(torch.cat((self.valid[:, : self.prefix], valid), dim=1))

    def staying(self, stay: Tensor) -> Tokens:
        """The tokens of some of the images, B, bool; the others leave the batch."""
        index = stay.nonzero().flatten()
        names = ("x", "size", "position", "key_bias", "policy", "valid", "parked")
        present = {name: getattr(self, name) for name in names}
        changes = {
            name: value.index_select(0, index)
            for name, value in present.items()
            if value is not None and len(value) == len(stay)  # one bias may serve all images
        }
        images = torch.arange(len(stay), device=stay.device) if self.images is None else self.images
        if self.source is not None:
            changes["source"] = self.source.index_fill(0, images[~stay], -1)
        return self.replace(images=images[stay], **changes)

    def masked(self, valid: Tensor) -> Tokens:
        """The tokens with padding, B×T bool, masked out of the attention. Takes the place of any
        other key bias.
        """
        if bool(valid.all()):  # a batch of one: nothing to mask, so the fastest attention kernel
            return self.replace(valid=None, key_bias=None)
        bias = torch.zeros(valid.shape, dtype=self.x.dtype, device=self.x.device).masked_fill(
            ~valid, _UNSEEN
        )
        return self.replace(valid=valid, key_bias=bias[:, None, None, :])

    def reduced(self, index: int, reduction: Reduction, importance: Tensor | None = None) -> Tokens:
        """The tokens after block ``index`` replaced its patch tokens; sizes, positions and trace
        follow along.

        Where a merged token stands was chosen by measurement (``.github/positions``). Under rotary
        positions it takes the place of its most important member, or of its first where there is no
        importance: the place nearest to the mean of its patches cost up to 30 points of accuracy.
        Under a relative position bias that mean was ahead by up to 5 points, so it is taken.
        """
        changes: dict[str, Any] = {"x": torch.cat((self.x[:, : self.prefix], reduction.x), dim=1)}
        position = self._positions(reduction, importance)
        if position is not None:
            changes["position"] = position
        if self.size is not None:
            changes["size"] = reduction.sizes(self.size)
        if self.source is not None:
            assignment, fate = (
                self.whole(reduction.assignment, -1),
                self.whole(reduction.role, int(Role.DROPPED)),
            )
            held = torch.where(
                self.source < 0, assignment.shape[1], self.source
            )  # what is gone stays so, at the end
            source = torch.nn.functional.pad(assignment, (0, 1), value=-1).gather(1, held)
            role = torch.nn.functional.pad(fate, (0, 1), value=int(Role.DROPPED)).gather(1, held)
            scores = None if importance is None else self.whole(importance.detach())
            changes["source"] = source
            changes["layers"] = (*self.layers, LayerTrace(index, scores, source, role))
        return self.replace(**changes)

    def _positions(self, reduction: Reduction, importance: Tensor | None) -> Tensor | None:
        """Where the tokens that leave stand, B×M; ``None`` where nothing asks."""
        place, group, groups = reduction.place, reduction.assignment, reduction.x.shape[1]
        if place is None and self.geometry is None and self.position is None:
            return None
        position = self.position
        if place is None and self.geometry is not None and self.geometry.columns is not None:
            assert self.size is not None
            if position is None:
                position = torch.arange(self.count, device=self.x.device).expand_as(group)
            return mean_places(group, groups, position, self.size, self.geometry.columns)
        if place is None:
            place = first_members(
                group, groups, None if importance is None else rank_order(importance)
            )
        return place if position is None else position.gather(1, place)


@dataclass(frozen=True)
class Output:
    """Everything one forward pass gives.

    Attributes:
        logits: what the timm model's head returns, usually B×classes.
        features: B×T×C after the final norm, prefix tokens first.
        size: B×(T-prefix), patches each token stands for; ``None`` where nothing asks for it.
        carry: the strategy's own tensors, for its losses.
        trace: what became of every patch, if asked for.
    """

    logits: Tensor
    features: Tensor
    size: Tensor | None
    carry: dict[str, Any]
    trace: Trace | None = None
