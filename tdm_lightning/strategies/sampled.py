"""Training of learned decisions which tokens to keep: sampled, and merged where a merger is
stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.tokens import Output, Reduction, Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers.token_merger import TokenMerger

Predictor = Callable[[Tensor, Tensor], Tensor]


def start_sampling(tokens: Tokens) -> Tokens:
    """Every token starts with a policy of 1, so the ε of masked attention acts from the first
    block on.
    """
    return tokens.carrying(decisions=()).replace(
        policy=torch.ones(tokens.x.shape[:2], device=tokens.x.device)
    )


def merge_sampled(
    index: int, tokens: Tokens, merger: TokenMerger, predictor: Predictor, keep: int
) -> Tokens:
    """The tokens after a merger had samples of the keep probabilities as importance.

    Gradients reach the decisions through the weights of the combined tokens, and through a policy
    on them that is 1.

    Args:
        index: the block.
        tokens: those of a training pass, with a policy.
        merger: combines them.
        predictor: logits of keeping and of dropping each, B×N×2, from tokens B×N×C and policy
            B×N.
        keep: how many leave.
    """
    assert tokens.policy is not None
    prefix, policy = tokens.policy.split((tokens.prefix, tokens.count), dim=1)
    probability = F.gumbel_softmax(predictor(tokens.patches, policy), tau=1.0, hard=False)[..., 0]
    reduction = merger(tokens.patches, probability, keep)
    # A straight-through 1 for every token, averaged inside each group: the forward pass attends to
    # all alike, the backward pass tells the predictor whether attending to a token helped, as the
    # mask does where nothing is merged.
    through = policy * (1 + probability - probability.detach())
    members = reduction.sizes(torch.ones_like(through))
    policy = reduction.sizes(through) / members
    held = tokens.carry.get("holder")
    tokens = tokens.carrying(
        decisions=(*tokens.carry["decisions"], probability),
        holder=reduction.assignment if held is None else reduction.assignment.gather(1, held),
    )
    return merged(
        index,
        tokens.replace(policy=torch.cat((prefix, policy), dim=1)),
        merger,
        reduction,
        probability,
    )


def merged(
    index: int, tokens: Tokens, merger: TokenMerger, reduction: Reduction, score: Tensor
) -> Tokens:
    """The tokens after a merger's reduction, with its proportional attention if it has one."""
    tokens = tokens.reduced(index, reduction, score)
    return tokens.with_size_bias() if merger.proportional_attention else tokens


def sampled_decisions(output: Output, name: str) -> tuple[Tensor, ...]:
    """How far each token was kept, stage by stage, in a training pass of the strategy ``name``.

    Raises:
        ValueError: if the pass was not made in training mode.
    """
    decisions: tuple[Tensor, ...] | None = output.carry.get("decisions")
    if decisions is None:
        raise SettingError(
            f"{name}'s predictors only learn in training mode: call model.train() before the"
            " forward pass"
        )
    return decisions


def ratio_error(
    decisions: Sequence[Tensor], wanted: Sequence[float], initial: int, per_image: bool
) -> Tensor:
    """Squared distance of the kept shares from a schedule, the mean over its stages.

    Args:
        decisions: how far each token was kept at each stage, B×N each.
        wanted: the schedule.
        initial: number of patches that the shares are of.
        per_image: hold every image to it, not the mean over the batch.
    """
    share = torch.stack([decision.sum(1) for decision in decisions], dim=1) / initial
    share = share if per_image else share.mean(dim=0, keepdim=True)
    return (share - share.new_tensor(wanted)).square().mean()
