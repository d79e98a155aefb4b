"""DPC-KNN: cluster all tokens by density peaks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.mergers import Cluster, Merger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction


class DPCKNN(TokenReduction):
    """Clusters the patch tokens around density peaks before some blocks (TCFormer, Zeng et al.,
    CVPR 2022).

    In the form of Haurum et al., 2023 (``TokenReduction``). The diversity-only counterpart of TDM:
    importance plays no part. At stage s all tokens are merged into ``int(keep_rate^s · N0)``
    clusters by the k-nearest-neighbour kernel, each the weighted mean of its members, ordered by
    the score of its centre. Where the official code adds noise to tell equal densities apart, the
    earlier token counts as denser here, so results can be repeated. DeiT-S at 0.7: 196 → 137 →
    96 → 67.

    Args:
        keep_rate: number of clusters at the first reducing layer as a share of the initial patch
            tokens, its square at the second, and so on; in (0, 1].
        layers: blocks *before* which tokens are clustered, counted from 0.
        neighbours: k of the density kernel, the token itself included.
        learned_weights: weigh a cluster's members by ``exp`` of a learned linear score (C+1
            parameters per layer) instead of equally.
        merger: what merges; ``None``: :class:`~tdm_lightning.Cluster`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        neighbours: int = 5,
        learned_weights: bool = False,
        merger: Merger | None = None,
    ) -> None:
        own = Cluster("knn", neighbours, "importance" if learned_weights else "mean")
        schedule = RateAtBlocks(keep_rate, layers, "initial")
        super().__init__(None, schedule, own if merger is None else merger, before=True)
        self.neighbours, self.learned_weights = own.neighbours, bool(learned_weights)
        self.merger = merger
        self.scorers = nn.ModuleList()

    @property
    def scores_tokens(self) -> bool:
        """Only with learned weights."""
        return self.learned_weights

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check the layers; make one scorer for each if weights are learned."""
        super().bind(vit, info)
        if self.learned_weights:
            self.scorers.extend(nn.Linear(info.width, 1, device=info.device) for _ in self.layers)

    def score_tokens(self, index: int, seen: Seen) -> Tensor | None:
        """The learned weights, where there are some."""
        if not self.learned_weights:
            return super().score_tokens(index, seen)
        score = self.scorers[self.layers.index(index)](seen.x).squeeze(-1).float()
        # Only ratios inside a cluster count, so the largest score may be taken off first: exp
        # cannot overflow.
        return (score - score.amax(dim=1, keepdim=True)).exp()
