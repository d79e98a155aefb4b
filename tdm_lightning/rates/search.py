"""A search for the number of tokens that each block leaves, for any merger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tdm_lightning.core.checks import check_layers, check_layers_exist
from tdm_lightning.errors import SettingError
from tdm_lightning.flops import macs_with
from tdm_lightning.rates.cost import counts_of, fitted_cost
from tdm_lightning.rates.distortion import distortion
from tdm_lightning.schedules import CountPerBlock
from tdm_lightning.strategies import TokenReduction
from tdm_lightning.vit import attach
from tdm_lightning.vit.adapters import model_info

#: How far below the budget a setting may stay, as a share of it: one token more or less can be as
#: much in a small model. In others the nearest setting lies closer.
_TOLERANCE = 0.05
#: What the fitted cost may be wrong by.
_MARGIN = 0.001
#: Factors on one block's reduction that are tried, in this order; 0: the block reduces nothing.
_FACTORS = (2.0, 0.5, 0.0, 1.4, 0.7)


@dataclass(frozen=True)
class Learned:
    """What was found.

    Attributes:
        strategy: the method with the learned schedule, not attached.
        counts: patch tokens that each block leaves.
        loss: mean distortion on the images, see :func:`~tdm_lightning.rates.distortion`.
        start: the same of the constant rate that the search began with.
        gmacs: 10⁹ multiply-accumulates per image, everything counted.
        tried: settings that were looked at.
    """

    strategy: TokenReduction
    counts: list[int]
    loss: float
    start: float
    gmacs: float
    tried: int


@torch.no_grad()
def learn_counts(
    vit: nn.Module,
    strategy: TokenReduction,
    images: Sequence[Tensor],
    gmacs: float,
    layers: Sequence[int] | None = None,
    sweeps: int = 2,
    done: Callable[[Learned], None] | None = None,
) -> Learned:
    """Learn how many tokens each block should leave at a budget, without labels or gradients.

    Blocks reduce by shares. From a constant share in all of them, one block at a time is made to
    reduce more, less or not at all, the others so much less or more that the budget is met again,
    and what brings the answers nearer to the unreduced model's is kept. Counts are learned as
    DiffRate's are (Chen et al., ICCV 2023), by trial where that follows gradients, so any merger
    can be used.

    Args:
        vit: a trained timm ViT; it is put into evaluation mode.
        strategy: importance and merger; its schedule is replaced.
        images: batches B×C×H×W, on the model's device.
        gmacs: the budget in 10⁹ multiply-accumulates per image, everything counted.
        layers: the blocks that may reduce, from 0; ``None``: all.
        sweeps: most times to go through the blocks; ends early where nothing is gained.
        done: called with the best so far after each step, of which there are at most
            :func:`most_steps`.

    Returns:
        The best setting found. The same arguments give the same.

    Raises:
        ValueError: if the budget cannot be met; the message has the range that can.
    """
    vit.eval()
    info = model_info(vit)
    chosen = tuple(range(info.depth)) if layers is None else check_layers(layers)
    check_layers_exist(chosen, info.depth)
    plain = [vit(batch) for batch in images]

    def at(counts: list[int]) -> TokenReduction:
        return _with_counts(strategy, counts)

    def exact(counts: list[int]) -> float:
        return macs_with(vit, at(counts), total=True) / 1e9

    def loss(counts: list[int]) -> float:
        model = attach(vit, at(counts)).eval()
        distances = [
            distortion(answer, model(batch), info.num_classes > 0)
            for batch, answer in zip(images, plain, strict=True)
        ]
        return float(torch.cat(distances).double().mean())

    cost = fitted_cost(info.depth, info.patches, chosen, exact)
    shares = [1.0 if block in chosen else 0.0 for block in range(info.depth)]
    counts = _at_budget(shares, info.patches, cost, gmacs)
    if counts is None or not _meets(price := _or_nan(exact, counts), gmacs):
        raise SettingError(_reachable(shares, info.patches, exact, gmacs))
    start = loss(counts)
    best = Learned(at(counts), counts, start, start, price, 1)
    seen = {tuple(counts)}
    for _ in range(sweeps):
        before = best.loss
        for block, factor in ((b, f) for b in chosen for f in _FACTORS):
            trial = [s * (factor if b == block else 1.0) for b, s in enumerate(shares)]
            found = _at_budget(trial, info.patches, cost, gmacs) if any(trial) else None
            new = found is not None and tuple(found) not in seen
            if found is not None and new and _meets(_or_nan(exact, found), gmacs):
                seen.add(tuple(found))
                reached = loss(found)
                best = replace(best, tried=len(seen))
                if reached < best.loss:
                    shares = trial
                    best = Learned(at(found), found, reached, start, exact(found), len(seen))
            if done is not None:
                done(best)
        if best.loss >= before:
            break
    return best


def most_steps(blocks: int, sweeps: int) -> int:
    """The steps of a search over so many blocks that does not end early."""
    return sweeps * blocks * len(_FACTORS)


def _with_counts(strategy: TokenReduction, counts: list[int]) -> TokenReduction:
    return TokenReduction(
        strategy.importance, CountPerBlock(counts), strategy.reducer, strategy.before
    )


def _meets(price: float, gmacs: float) -> bool:
    return gmacs * (1 - _TOLERANCE) <= price <= gmacs


def _at_budget(
    shares: Sequence[float], patches: int, cost: Callable[[list[int]], float], gmacs: float
) -> list[int] | None:
    """The counts that cost most within the budget; ``None``: no such."""
    low, high = 0.0, 8.0  # strengths: too dear, and within the budget if anything is
    found = None
    for _ in range(24):
        middle = (low + high) / 2
        counts = counts_of(shares, middle, patches)
        if cost(counts) <= gmacs * (1 - _MARGIN):
            found, high = counts, middle
        else:
            low = middle
    return found


def _reachable(
    shares: Sequence[float], patches: int, exact: Callable[[list[int]], float], gmacs: float
) -> str:
    """Why a budget cannot be met."""
    settings = {tuple(counts_of(shares, step / 4, patches)) for step in range(17)}
    prices = [price for s in settings if not math.isnan(price := _or_nan(exact, list(s)))]
    return (
        f"{gmacs:g} GMACs cannot be met: with these blocks and this merger it can be from"
        f" {min(prices):.4g} to {max(prices):.4g}; give a budget in between, more blocks, or a"
        " merger that can take more away in one of them"
    )


def _or_nan(exact: Callable[[list[int]], float], counts: list[int]) -> float:
    """The cost; NaN for more than the merger can do in a block."""
    try:
        return exact(counts)
    except ValueError:
        return math.nan
