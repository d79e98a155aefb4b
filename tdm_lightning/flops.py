"""Multiply-accumulates of a ViT, reduced or not, counted by torch's own counter.

The "FLOPs" of the token-reduction papers are multiply-accumulates (MACs). Counted are the patch
embedding, all linear layers, both attention products and the head; not counted are biases, softmax,
activations, norms, residual sums and gathers.

Masked heads and MLP units (:class:`~tdm_lightning.sparsity.Structured`) count as taken out, because
that is how the model runs once it is trained; masks on single weights save nothing.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tdm_lightning.core.shards import is_sharded
from tdm_lightning.errors import SettingError
from tdm_lightning.ops.linear import check_not_quantized
from tdm_lightning.sparsity.extract import Parts, kept_parts, shrink
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.vit import TokenReducedViT, attach
from tdm_lightning.vit.adapters import input_size as model_input_size
from tdm_lightning.vit.in_place import Encoder, as_function, restore

#: Stages of a pass in which the timm model works; all others are the strategy's own.
_BACKBONE = ("embed", "attention", "mlp", "head", "begin", "finish")


@dataclass(frozen=True)
class BlockMACs:
    """Multiply-accumulates in one block, per image.

    Attributes:
        index: the block, counted from 0.
        tokens: patch tokens after it, the mean over images where a strategy is adaptive.
        attention: its attention half (the whole block where both halves run in parallel).
        mlp: its MLP half.
        strategy: the strategy's parameter-free work here: importance, similarities, merging.
    """

    index: int
    tokens: float
    attention: float
    mlp: float
    strategy: float


@dataclass(frozen=True)
class MACReport:
    """Multiply-accumulates per image, part by part.

    Attributes:
        embed: patch embedding.
        head: pooling and classifier.
        blocks: each block.
        learned: the strategy's own layers with parameters, such as predictors.
        plain: the same timm model without the strategy, all of its heads and units there.
        forward: everything that ``model(images)`` does: :attr:`total`, but where the head reads
            class tokens alone the last block computes no other row. Papers do not count so.
    """

    embed: float
    head: float
    blocks: list[BlockMACs] = field(repr=False)
    learned: float
    plain: float
    forward: float

    @property
    def backbone(self) -> float:
        """What the papers count: the timm model's layers and the strategy's learned ones."""
        return (
            self.embed
            + self.head
            + self.learned
            + sum(block.attention + block.mlp for block in self.blocks)
        )

    @property
    def strategy(self) -> float:
        """The strategy's parameter-free work, which the papers leave out."""
        return sum(block.strategy for block in self.blocks)

    @property
    def total(self) -> float:
        """Everything."""
        return self.backbone + self.strategy

    @property
    def reduction(self) -> float:
        """Share of the plain model's multiply-accumulates that is saved, ``1 - backbone/plain``."""
        return 1 - self.backbone / self.plain


class _Counter:
    """Attributes the flop counter's total to stages of a pass."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.stages: dict[tuple[str, int], int] = defaultdict(int)
        self.learned: dict[tuple[str, int], int] = defaultdict(int)
        self.pending = 0
        self.inside = 0
        self.last = 0

    def watch(self, stage: str, index: int) -> None:
        now = self.counter.get_total_flops()
        self.stages[stage, index] += now - self.last - self.pending
        self.learned[stage, index] += self.pending
        self.last, self.pending = now, 0

    @property
    def backbone(self) -> int:
        """What the papers count."""
        own = sum(value for (stage, _), value in self.stages.items() if stage in _BACKBONE)
        return own + sum(self.learned.values())

    @property
    def total(self) -> int:
        """Everything."""
        return sum(self.stages.values()) + sum(self.learned.values())

    def enter(self, *_: object) -> None:
        self.inside = self.counter.get_total_flops()

    def leave(self, *_: object) -> None:
        self.pending += self.counter.get_total_flops() - self.inside


def _learned_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The strategy's own layers; a list of layers is never called itself, so its items count."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, Strategy)):
            yield from _learned_layers(child)
        else:
            yield child


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without storage, in the same mode: every tensor is replaced before it would be
    copied.
    """
    tensors: dict[int, object] = {
        id(p): nn.Parameter(_without_storage(p), requires_grad=False) for p in model.parameters()
    }
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, tensors)


def _without_storage(weight: Tensor) -> Tensor:
    """On meta; a shard as the whole that it belongs to."""
    if is_sharded(weight):
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return weight.detach().to("meta")


@torch.no_grad()
def _count(model: nn.Module, images: Tensor, logits_alone: bool = False) -> _Counter:
    # The math backend, because the counter does not see the fused CPU kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stages = _Counter(counter)
        if isinstance(model, TokenReducedViT):
            handles = []
            for layer in _learned_layers(model.strategy):
                handles += [
                    layer.register_forward_pre_hook(stages.enter),
                    layer.register_forward_hook(stages.leave),
                ]
            try:
                model.run(images, watch=stages.watch, logits_alone=logits_alone)
            finally:
                for handle in handles:
                    handle.remove()
        else:
            as_function(model)(images)
            stages.watch("embed", -1)
    return stages


def mac_report(
    model: nn.Module, input_size: tuple[int, int, int] | None = None, images: Tensor | None = None
) -> MACReport:
    """Multiply-accumulates of one forward pass, per image and part by part.

    Args:
        model: a reduced model, or a plain timm ViT.
        input_size: channels, height and width; the model's own by default.
        images: real images, B×C×H×W, on the model's device: needed where the number of tokens
            depends on them; the report is then their mean.

    Returns:
        The report; for a fixed-budget strategy its numbers are exact integers.

    Raises:
        ValueError: for an adaptive strategy without images, or quantised linear layers.
    """
    given = images
    counted, images = _prepared(model, input_size, images)
    per_image = 2 * images.shape[0]  # the counter counts a multiply and an add
    stages = _count(counted, images)
    if not isinstance(counted, TokenReducedViT):
        total = stages.backbone / per_image
        return MACReport(embed=total, head=0, blocks=[], learned=0, plain=total, forward=total)
    counts = _token_counts(counted, images)
    unreduced, same = _prepared(model.vit, input_size, given)  # type: ignore[arg-type]
    if counted.in_place:
        restore(unreduced)
        unreduced = TokenReducedViT(unreduced, Strategy())  # what is counted beside it, no more
    plain = _count(unreduced, same).backbone / per_image

    def part(*names: str, index: int) -> float:
        return sum(stages.stages[name, index] for name in names) / per_image

    blocks = [
        BlockMACs(
            index,
            tokens,
            attention=part("attention", index=index),
            mlp=part("mlp", index=index),
            strategy=part("before_block", "after_attention", "after_block", index=index),
        )
        for index, tokens in enumerate(counts)
    ]
    head = part("head", "begin", "finish", index=-1)
    learned = sum(stages.learned.values()) / per_image
    forward = _count(counted, images, logits_alone=True).total / per_image
    return MACReport(part("embed", index=-1), head, blocks, learned, plain, forward)


def _prepared(
    model: nn.Module, input_size: tuple[int, int, int] | None, images: Tensor | None
) -> tuple[nn.Module, Tensor]:
    """A copy of the model to run, and the images to run it on."""
    check_not_quantized(model, "count the multiply-accumulates")
    if images is None:
        if isinstance(model, TokenReducedViT) and model.strategy.adaptive:
            raise SettingError(
                f"{type(model.strategy).__name__} keeps another number of tokens for each image:"
                " pass images=… to count some"
            )
        dtype = next(model.parameters()).dtype
        images = torch.zeros(
            1, *(input_size or default_input_size(model)), dtype=dtype, device="meta"
        )
        return _trimmed(_on_meta(model).eval(), kept_parts(model)), images
    return _trimmed(copy.deepcopy(model).eval(), kept_parts(model)), images


def _trimmed(copied: nn.Module, parts: list[Parts] | None) -> nn.Module:
    """A copied model without its masked heads and units."""
    if parts is not None:
        copied.vit = shrink(copied.vit, parts)
    return copied


@torch.no_grad()
def _token_counts(model: TokenReducedViT, images: Tensor) -> list[float]:
    counts = model.trace(images)[1].token_counts
    return [count.float().mean().item() for count in counts] if model.strategy.adaptive else counts


def count_macs(
    model: nn.Module, input_size: tuple[int, int, int] | None = None, images: Tensor | None = None
) -> int:
    """Multiply-accumulates of the backbone per image, as the papers report them; the merger's own
    work is left out.

    Counted on the meta device, so it costs no memory and does not depend on the attention kernel.
    Arguments and errors as :func:`mac_report`.

    >>> import timm
    >>> count_macs(timm.create_model("deit_small_patch16_224"))
    4598882304
    """
    counted, images = _prepared(model, input_size, images)
    return round(_count(counted, images).backbone / (2 * images.shape[0]))


def step_flops(model: TokenReducedViT, shape: tuple[int, ...]) -> int:
    """Floating-point operations of a step on a batch, two for a multiply and an add, the strategy's
    own work included.

    Counted for the mode that the model is in: many methods train with all of their tokens. In
    training the backward pass takes twice as much again as the forward pass.

    Args:
        model: a reduced model.
        shape: of the images, B×C×H×W.

    Raises:
        ValueError: for an adaptive strategy.
    """
    if model.strategy.adaptive:
        raise SettingError(
            f"{type(model.strategy).__name__} keeps another number of tokens for each image: a"
            " shape does not tell"
        )
    batch, *size = shape
    images = torch.zeros(1, *size, dtype=next(model.parameters()).dtype, device="meta")
    return _count(_on_meta(model), images).total * batch * (3 if model.training else 1)


@dataclass(frozen=True)
class ImageCosts:
    """What each image costs by itself, for strategies that decide image by image.

    Attributes:
        macs: multiply-accumulates of the backbone, B, without the padding that a batch adds;
            float64.
        tokens: patch tokens after each block, B×depth, float64.
    """

    macs: Tensor
    tokens: Tensor


@torch.no_grad()
def image_costs(model: TokenReducedViT, images: Tensor) -> ImageCosts:
    """Costs of images B×C×H×W one by one, on the model's device."""
    counted, _ = _prepared(model, None, images)
    assert isinstance(counted, TokenReducedViT)
    macs = [_count(counted, image.unsqueeze(0)).backbone / 2 for image in images]
    counts = counted.trace(images)[1].token_counts
    tokens = [
        count if isinstance(count, Tensor) else torch.full((len(images),), count)
        for count in counts
    ]
    return ImageCosts(
        torch.tensor(macs, dtype=torch.float64),
        torch.stack([count.cpu().double() for count in tokens], dim=1),
    )


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a ViT was made for."""
    vit: Any = model.vit if isinstance(model, (TokenReducedViT, Encoder)) else model
    return model_input_size(vit)


def macs_with(
    vit: nn.Module,
    strategy: Strategy,
    input_size: tuple[int, int, int] | None = None,
    total: bool = False,
) -> int:
    """:func:`count_macs` of a timm model under a strategy that is not attached to it yet.

    Args:
        vit: the timm model.
        strategy: any that keeps the same number of tokens for every image.
        input_size: as in :func:`mac_report`.
        total: count the strategy's parameter-free work too.
    """
    counted, images = _prepared(attach(vit, strategy), input_size, None)
    stages = _count(counted, images)
    return round((stages.total if total else stages.backbone) / (2 * images.shape[0]))
