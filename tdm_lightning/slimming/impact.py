"""How much each token of a block counts for what the network finally reads, as Patch Slimming has
it.
"""

from __future__ import annotations

from torch import Tensor

from tdm_lightning.ops.precision import full_precision


def attention_maps(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The attention that all tokens pay to all tokens.

    Args:
        q: queries, B×H×T×d.
        k: keys, B×H×T×d.
        scale: factor on their products.

    Returns:
        Softmax weights, B×H×T×T, float32.
    """
    with full_precision(q.device):
        return ((q.float() * scale) @ k.float().transpose(-2, -1)).softmax(dim=-1)


def influence_through(influence: Tensor, kept: Tensor, attention: Tensor) -> Tensor:
    """How far the tokens that enter a block reach the final ones, given how far those that leave it
    do.

    One factor of Patch Slimming's ``Ã = Π diag(m_l)·½(P̄_l + I)``, multiplied from the right:
    P̄ is the mean over heads, and half of a token is itself, for the residual. The paper sums over
    all paths of heads instead; the mean is our reading.

    Args:
        influence: of the tokens that leave the block on R final ones, B×R×T.
        kept: the tokens that the block computes, T, bool.
        attention: its weights, B×H×T×T.

    Returns:
        Influence of the tokens that enter it, B×R×T.
    """
    alive = influence * kept
    return 0.5 * (alive @ attention.mean(dim=1) + alive)


def impact_scores(influence: Tensor, attention: Tensor, x: Tensor) -> Tensor:
    """The impact of each token that a block computes: ``‖Ã[:, i]‖²·‖Ũ[i, :]‖²`` with
    ``Ũ = P̄·|Z|`` (Tang et al., CVPR 2022).

    Args:
        influence: how far the tokens that leave the block reach R final ones, B×R×T; from
            :func:`influence_through`.
        attention: the block's weights, B×H×T×T.
        x: the tokens Z that enter it, B×T×C.

    Returns:
        Scores, B×T, float32.

    >>> import torch
    >>> alone = torch.eye(2).expand(1, 1, 2, 2)
    >>> values = torch.tensor([[[1.0, -1.0], [3.0, 0.0]]])
    >>> impact_scores(torch.tensor([[[1.0, 2.0]]]), alone, values).tolist()
    [[2.0, 36.0]]
    """
    with full_precision(x.device):
        update = attention.mean(dim=1) @ x.float().abs()
        return influence.square().sum(dim=1) * update.square().sum(dim=2)
