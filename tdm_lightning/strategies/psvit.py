"""PS-ViT: every block computes a fixed set of patch positions, the same for all images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.checks import check_counts, check_keep_rate
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.core.trace import History
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.ops import inverse_order
from tdm_lightning.strategies.base import Requirements, Strategy


class PSViT(Strategy):
    """Computes in each block only the patch positions that later blocks need (Tang et al., "Patch
    Slimming", CVPR 2022).

    Block l asks with the tokens that it keeps and looks at those that block l-1 kept; attention,
    MLP and residual are computed for the kept ones alone. What a block keeps, the blocks before it
    keep too. Prefix tokens always stay. The masks belong to positions, so they fit one grid of
    patches only, and they lie in the state dict as ``kept``, depth×N, bool: weights and masks
    travel together, and masks that are loaded replace those of the arguments.

    The method's masks come from :func:`tdm_lightning.slimming.search` (``tdm slim``). Until then
    they are a placeholder without any knowledge of images: patches spread evenly over the grid, as
    many as ``keep_rate`` or ``counts`` say.

    At 0.91 DeiT-S costs 2.58 GMACs and DeiT-B 9.90, as published (2.6 and 9.8); DeiT-T takes 0.96
    for its published 0.93. The falling schedule is ours: the published counts are not public.

    Args:
        keep_rate: before a search, each block keeps ``ceil(keep_rate·N)`` of the N patches of the
            block before, in (0, 1]; below 1 the last block computes none where the head reads the
            class token alone.
        counts: patches that each block computes, in place of the keep rate's; they must not grow.
        masks: depth×N zeros and ones, which positions each block computes, in place of both; lists
            or a tensor.

    Attributes:
        token_counts: patches that each block computes; set by ``attach`` and on loading masks.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or masks are not
            nested.
    """

    kept: Tensor | None

    def __init__(
        self,
        keep_rate: float = 0.91,
        counts: Sequence[int] | None = None,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if counts is not None and masks is not None:
            raise SettingError(
                "counts and masks both say how many patches each block computes; give one of them"
            )
        self.keep_rate = check_keep_rate(keep_rate)
        self.counts = None if counts is None else check_counts(counts, "counts", least=0)
        self.masks = None if masks is None else _check_masks(masks)
        self.token_counts: tuple[int, ...] = ()
        self.register_buffer("kept", None)

    def requires(self) -> Requirements:
        """Blocks that compute chosen rows."""
        return Requirements(rows=True)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Lay out the masks on the model's grid.

        Raises:
            ValueError: if counts or masks do not fit the model, it drops patches by chance, no
                patch is left for a head that pools them, or the strategy is attached already.
        """
        if self.kept is not None:
            raise SettingError(
                "this PSViT is attached already and owns masks; make a new one for another model"
            )
        if info.random_patches:
            raise SettingError(
                "masks belong to positions, and this model drops patches by chance: use"
                " patch_drop_rate=0"
            )
        class_head = info.pooling == "token"
        with torch.device("cpu"):  # they are read here, also where the model is on the meta device
            kept = self._masks(info.depth, info.patches, class_head)
        if not class_head and not kept[-1].any():
            raise SettingError(
                "this model's head reads its patches, so the last block must keep at least one"
            )
        self.token_counts = tuple(kept.sum(dim=1).tolist())
        self.kept = kept.to(info.device)

    def schedule(self, depth: int, patches: int, class_head: bool = True) -> tuple[int, ...]:
        """Patches that each of ``depth`` blocks computes before a search.

        Args:
            depth: number of blocks.
            patches: number of patches that enter the first.
            class_head: whether the head reads the class token alone.
        """
        if self.counts is not None:
            return self.counts
        counts = [patches]
        for _ in range(depth):
            counts.append(math.ceil(self.keep_rate * counts[-1]))
        if class_head and self.keep_rate < 1:
            counts[-1] = 0
        return tuple(counts[1:])

    def _masks(self, depth: int, patches: int, class_head: bool) -> Tensor:
        if self.masks is not None:
            if len(self.masks) != depth or len(self.masks[0]) != patches:
                raise SettingError(
                    f"masks of {len(self.masks)} blocks and {len(self.masks[0])} patches do not fit"
                    f" this model's {depth} blocks and {patches} patches; masks belong to"
                    " positions: search again with `tdm slim`, or create the timm model with the"
                    " img_size that they were made for"
                )
            return torch.tensor(self.masks, dtype=torch.bool)
        counts = self.schedule(depth, patches, class_head)
        if len(counts) != depth:
            raise SettingError(
                f"counts must hold one number per block, {depth} here, got {len(counts)}:"
                f" {list(counts)}"
            )
        if counts[0] > patches:
            raise SettingError(
                f"counts must not exceed the model's {patches} patches, got {counts[0]} in the"
                " first block"
            )
        rank = inverse_order(evenly_distributed_order(patches)[None])
        return rank < torch.tensor(counts)[:, None]

    def begin(self, tokens: Tokens) -> Tokens:
        """Sort the patches by how many blocks compute them, so that each block simply keeps the
        first ones.

        Raises:
            ValueError: if there are more or fewer patches than the masks are for, or the keep rate
                is to be annealed.
        """
        assert self.kept is not None
        if tokens.count != self.kept.shape[1]:
            raise SettingError(
                f"PS-ViT's masks are for {self.kept.shape[1]} patches and these images have"
                f" {tokens.count}; masks belong to positions: resize the images, or search again at"
                " their size with `tdm slim`"
            )
        if self.current_keep_rate is not None:
            raise SettingError(
                "PS-ViT's masks are static, so there is no keep rate to anneal: leave"
                " KeepRateWarmup out"
            )
        if self.token_counts[-1] == tokens.count:
            return tokens
        # Derived from the masks in each pass: integer buffers would be rounded where weights are
        # averaged, buffers included.
        n = tokens.count
        key = self.kept.sum(dim=0).float() * n - torch.arange(
            n, device=self.kept.device
        )  # no ties: ONNX has no stable sort
        order = key.topk(n).indices
        first = torch.arange(tokens.prefix, device=order.device)
        tokens = tokens.replace(
            x=tokens.x.index_select(1, torch.cat((first, order + tokens.prefix)))
        )
        history = tokens.history
        if history is None:
            return tokens
        source = inverse_order(order[None]).expand_as(history.source)
        return tokens.replace(history=History(source, history.layers))

    def rows(self, index: int, tokens: Tokens) -> int | None:
        """Those of the prefix and of the patches that the block keeps."""
        kept = self.token_counts[index]
        return None if kept == tokens.count else tokens.prefix + kept

    def spares_class_tokens(self) -> bool:
        """See :class:`Strategy`: only what is gone is noted."""
        return self.keeps_hooks_of(PSViT)

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Note which patches are gone."""
        assert self.kept is not None
        before = self.token_counts[index - 1] if index else self.kept.shape[1]
        if tokens.count == before or (tokens.history is None and tokens.size is None):
            return tokens
        here = torch.arange(before, device=tokens.x.device).expand(len(tokens.x), -1)
        kept = here < tokens.count
        role = torch.where(kept, int(Role.KEPT), int(Role.DROPPED))
        reduction = Reduction(tokens.patches, torch.where(kept, here, -1), role)
        return tokens.reduced(index, reduction)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found, errors = state_dict.get(f"{prefix}kept"), args[-1]
        if found is not None and not _nested(found):
            errors.append(
                f"{prefix}kept: what a block keeps, the block before must keep too; these masks are"
                " not nested"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.kept is not None:
            self.token_counts = tuple(self.kept.sum(dim=1).tolist())

    def extra_repr(self) -> str:
        """The patches that each block computes, once that is known; masks are too long to print."""
        return (
            f"token_counts={list(self.token_counts)}" if self.token_counts else super().extra_repr()
        )


def evenly_distributed_order(patches: int) -> Tensor:
    """The patches of a grid, in an order whose every beginning is spread evenly; N, int64.

    By the fractional part of ``row/ρ + column/ρ²`` with ρ³ = ρ + 1, the plane's counterpart
    of the golden ratio. The grid is taken to be as square as the number allows.

    >>> first = evenly_distributed_order(16)[:4]
    >>> torch.stack((first // 4, first % 4)).tolist()
    [[0, 2, 0, 2], [0, 1, 2, 3]]
    """
    height = next(side for side in range(math.isqrt(patches), 0, -1) if patches % side == 0)
    row = torch.arange(height, dtype=torch.float64)[:, None]
    column = torch.arange(patches // height, dtype=torch.float64)
    rho = 1.324717957244746
    return (row / rho + column / rho**2).frac().flatten().argsort(stable=True)


def _nested(masks: Tensor) -> bool:
    return bool((masks[:-1].bool() | ~masks[1:].bool()).all())


def _check_masks(masks: Any) -> tuple[tuple[int, ...], ...]:
    rows = masks.tolist() if isinstance(masks, Tensor) else masks
    wrong = "masks must be depth×patches zeros and ones, a list for each block"
    if (
        isinstance(rows, str)
        or not isinstance(rows, Sequence)
        or not rows
        or not all(isinstance(r, Sequence) for r in rows)
    ):
        raise SettingTypeError(f"{wrong}, got {type(masks).__name__}")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or 0 in lengths:
        raise SettingError(f"{wrong}, of equal length; got lengths {sorted(lengths)}")
    if any(value not in (0, 1) for row in rows for value in row):
        raise SettingError(f"{wrong}, got other values")
    for block in range(1, len(rows)):
        extra = [
            patch
            for patch, (now, before) in enumerate(zip(rows[block], rows[block - 1], strict=True))
            if now > before
        ]
        if extra:
            raise SettingError(
                f"masks must be nested: block {block} keeps patch {extra[0]}, which block"
                f" {block - 1} did not keep; what a block keeps, all blocks before it must keep"
            )
    return tuple(tuple(int(value) for value in row) for row in rows)
