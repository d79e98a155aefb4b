"""One small adapter per timm block family: run its attention half, observe it, run its MLP half.

An adapter calls the block's own modules and never re-implements their arithmetic, so LayerScale,
drop-path, QK norm, gates and inner norms stay timm's. Calling a block's parts fires no forward hook
on the block; ``TokenReducedViT.taps`` stands in for those.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import beit as timm_beit
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit
from timm.models import vision_transformer_relpos as timm_relpos
from torch import Tensor, nn

from tdm_lightning.core.tokens import Observed, Tokens
from tdm_lightning.ops import (
    QueryKey,
    class_row,
    linear_bias,
    linear_weight,
    mean_keys,
    received_attention,
)
from tdm_lightning.vit.attention import (
    BIASED,
    KNOWN,
    ROTARY,
    UnsupportedBlock,
    biased_attention,
    full_attention,
    norm_or_none,
    own_bias,
    query_key,
    rotary_attention,
)


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


class BlockAdapter:
    """Splits one timm block into attention and MLP.

    Args:
        class_rows: leading tokens that stand for the class; 0: none.
        index: the block's place in the model.
    """

    #: Whether :meth:`attend` heeds ``tokens.queries``.
    selects_rows: bool = False

    def __init__(self, class_rows: int, index: int = 0) -> None:
        self.class_rows = class_rows
        self.index = index

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """The tokens after the attention residual, B×T×C, and the inputs of the block's
        attentions, each B×T×C.
        """
        raise TypeError(f"{type(self).__name__} must override attend()")

    def projections(self, block: Any, tokens: Tokens) -> list[QueryKey]:
        """The query and key projections of the block's attentions."""
        return [query_key(block.attn, self.rope(tokens))]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """The tokens after attention as the MLP sees them, B×T×C."""
        return block.norm2(x)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """The tokens after the MLP residual, B×T×C."""
        raise TypeError(f"{type(self).__name__} must override feed_forward()")

    def observe(
        self, block: Any, tokens: Tokens, inputs: list[Tensor], x: Tensor, needs: frozenset[str]
    ) -> Observed:
        """What a strategy asked to see; with several attentions in parallel, their mean.

        Args:
            block: the timm block.
            tokens: the tokens that entered it.
            inputs: the inputs of its attentions.
            x: the tokens after attention.
            needs: see :meth:`Strategy.needs`.
        """
        seen = list(zip(inputs, self.projections(block, tokens), strict=True))
        importance = keys = normed = None
        if "importance" in needs:
            bias = self.bias(getattr(block, "attn", None), tokens)
            importance = _mean([self._importance(h, qk, bias, tokens.prefix) for h, qk in seen])
        if "keys" in needs:
            keys = _mean([mean_keys(h, qk) for h, qk in seen])
        if "normed" in needs:
            normed = self.normed(block, x)
        return Observed(importance, seen[0][1].heads, keys, normed)

    def _importance(self, h: Tensor, qk: QueryKey, bias: Tensor | None, prefix: int) -> Tensor:
        paired = (
            bias is not None and bias.shape[-2] > 1
        )  # a bias for each pair of tokens, not for each key alone
        if self.class_rows:
            bias = bias[:, :, : self.class_rows] if paired else bias  # type: ignore[index]
            return class_row(h, qk, self.class_rows, bias).mean(dim=(1, 2))[:, prefix:]
        bias = bias[:, :, prefix:] if paired else bias  # type: ignore[index]
        return received_attention(h, qk, prefix, bias)

    def rope(self, tokens: Tokens) -> Tensor | None:
        """Rotary embeddings of the patch tokens, broadcast to B×H×N×D; ``None`` in models
        without.
        """
        if tokens.geometry is None or not tokens.geometry.rope:
            return None
        table = tokens.geometry.rope[self.index]
        if tokens.position is None:
            return table
        if table.ndim == 2:
            return table[tokens.position].unsqueeze(1)
        return table[:, tokens.position].transpose(0, 1)

    def bias(self, attn: Any, tokens: Tokens) -> Tensor | None:
        """What is added to the attention logits: the tokens' own bias, and that of their relative
        positions.
        """
        if not isinstance(attn, BIASED):
            return tokens.key_bias
        table = own_bias(attn, None if tokens.geometry is None else tokens.geometry.bias)
        if table is None:
            return tokens.key_bias
        if tokens.position is not None:
            prefix = torch.arange(tokens.prefix, device=table.device).expand(
                tokens.position.shape[0], -1
            )
            place = torch.cat((prefix, tokens.position + tokens.prefix), dim=1)
            table = table[0][:, place.unsqueeze(2), place.unsqueeze(1)].transpose(0, 1)
        table = table.to(tokens.x.dtype)
        return table if tokens.key_bias is None else table + tokens.key_bias

    def attention(self, attn: Any, h: Tensor, tokens: Tokens) -> Tensor:
        """One of the block's attentions on its input, B×T×C."""
        if isinstance(attn, ROTARY):
            return rotary_attention(attn, h, tokens, self.rope(tokens))
        if isinstance(attn, BIASED):
            return biased_attention(attn, h, tokens, self.bias(attn, tokens))
        return full_attention(attn, h, tokens)


class PreNorm(BlockAdapter):
    """``Block``, ``RelPosBlock``: norm → attention → residual, norm → MLP → residual."""

    selects_rows = True

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        h = block.norm1(tokens.x)
        x = tokens.x if tokens.queries is None else tokens.x.index_select(1, tokens.queries)
        return x + block.drop_path1(block.ls1(self.attention(block.attn, h, tokens))), [h]

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class PreNormGamma(BlockAdapter):
    """The blocks of ``Eva`` and ``Beit``: as :class:`PreNorm`, with layer scales that are the
    block's own or missing.
    """

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        h = block.norm1(tokens.x)
        return tokens.x + block.drop_path1(
            _scaled(self.attention(block.attn, h, tokens), block.gamma_1)
        ), [h]

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + block.drop_path2(_scaled(block.mlp(block.norm2(x)), block.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class ResPost(BlockAdapter):
    """``ResPostBlock`` and its like: attention → norm → residual, MLP → norm → residual."""

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        return tokens.x + block.drop_path1(
            block.norm1(self.attention(block.attn, tokens.x, tokens))
        ), [tokens.x]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """No norm stands before this MLP."""
        return x

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + block.drop_path2(block.norm2(block.mlp(x)))


class ParallelScaling(BlockAdapter):
    """``ParallelScalingBlock`` (ViT-22B): attention and MLP side by side, so reduction comes after
    the block.
    """

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """Run the whole block; its attention's input is formed again only where :meth:`observe`
        wants it.
        """
        if tokens.policy is not None:
            raise UnsupportedBlock(
                f"training with a policy needs timm's Attention; {type(block).__name__} has its own"
            )
        return (
            block(tokens.x, **({} if tokens.key_bias is None else {"attn_mask": tokens.key_bias})),
            [],
        )

    def observe(
        self, block: Any, tokens: Tokens, inputs: list[Tensor], x: Tensor, needs: frozenset[str]
    ) -> Observed:
        """See :meth:`BlockAdapter.observe`."""
        return super().observe(block, tokens, [block.in_norm(tokens.x)], x, needs)

    def projections(self, block: Any, tokens: Tokens) -> list[QueryKey]:
        """Slices of the joint input projection."""
        hidden, width = block.in_split[0], block.in_split[1]
        weight, bias = linear_weight(block.in_proj), linear_bias(block.in_proj)
        q, k = slice(hidden, hidden + width), slice(hidden + width, hidden + 2 * width)
        heads = width // block.head_dim
        q_bias, k_bias = (None, None) if bias is None else (bias[q], bias[k])
        return [
            QueryKey(
                weight[q],
                q_bias,
                weight[k],
                k_bias,
                heads,
                block.scale,
                norm_or_none(block.q_norm),
                norm_or_none(block.k_norm),
            )
        ]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """The block has one norm for both halves."""
        return block.in_norm(x)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


class ParallelThings(BlockAdapter):
    """``ParallelThingsBlock``: several attentions side by side, then several MLPs."""

    def attend(self, block: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`BlockAdapter.attend`."""
        inputs = [branch.norm(tokens.x) for branch in block.attns]
        outputs = [
            branch.drop_path(branch.ls(self.attention(branch.attn, h, tokens)))
            for branch, h in zip(block.attns, inputs, strict=True)
        ]
        return tokens.x + torch.stack(outputs).sum(dim=0), inputs

    def projections(self, block: Any, tokens: Tokens) -> list[QueryKey]:
        """One for each branch."""
        return [query_key(branch.attn) for branch in block.attns]

    def normed(self, block: Any, x: Tensor) -> Tensor:
        """The mean over the branches' norms."""
        return torch.stack([branch.norm(x) for branch in block.ffns]).mean(0)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockAdapter.feed_forward`."""
        return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0)


_ADAPTERS: dict[type[nn.Module], type[BlockAdapter]] = {
    timm_vit.Block: PreNorm,
    timm_vit.ResPostBlock: ResPost,
    timm_vit.ParallelScalingBlock: ParallelScaling,
    timm_vit.DiffParallelScalingBlock: ParallelScaling,
    timm_vit.ParallelThingsBlock: ParallelThings,
    timm_eva.EvaBlock: PreNormGamma,
    timm_eva.EvaBlockPostNorm: ResPost,
    timm_beit.Block: PreNormGamma,
    timm_relpos.RelPosBlock: PreNorm,
    timm_relpos.ResPostRelPosBlock: ResPost,
}


def adapter_for(block: Any, class_rows: int, index: int = 0) -> BlockAdapter:
    """The adapter of a block's family, for the block at place ``index``.

    Raises:
        UnsupportedBlock: if there is none, or the block holds an attention that cannot be observed.
    """
    adapter = _ADAPTERS.get(type(block))
    if adapter is None:
        known = ", ".join(cls.__name__ for cls in _ADAPTERS)
        raise UnsupportedBlock(
            f"its blocks are {type(block).__module__}.{type(block).__name__}; supported are {known}"
        )
    for module in [
        getattr(block, "attn", None),
        *(branch.attn for branch in getattr(block, "attns", ())),
    ]:
        if module is not None and not isinstance(module, KNOWN):
            known = ", ".join(cls.__name__ for cls in KNOWN)
            raise UnsupportedBlock(
                f"its attention is {type(module).__name__}; supported are {known}"
            )
    return adapter(class_rows, index)
