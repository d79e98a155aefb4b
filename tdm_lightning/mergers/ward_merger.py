"""Ward's linkage, several rounds in one block."""

from __future__ import annotations

from tdm_lightning.core.checks import check_count, check_number
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers.base import Merger
from tdm_lightning.mergers.pairing import means_of_patches
from tdm_lightning.ops import fewest_after, rank_order, ward_plan


class WardMerger(Merger):
    """Merges tokens so that the weighted variance of their features grows least, in several rounds.

    What is compared are the tokens and, between attention and MLP, their head-averaged keys, each
    of unit length and side by side; sizes are the weights (Ward's linkage, see
    :func:`~tdm_lightning.ops.ward_groups`). Every group becomes the mean of its patches. The most
    important tokens may be protected: they take no part. Ours, not of a paper.

    The rounds pair by places, so this merger does not commute with a permutation of the patches.

    Args:
        rounds: in one block; each at most halves what takes part. ``None``: the exact
            agglomeration, one pair at a time, the upper limit for studies.
        protect: share of the tokens that is protected, those of the highest importance, rounded
            down, in [0, 1); 0 needs no importance.
        proportional_attention: see :class:`Merger`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        rounds: int | None = 4,
        protect: float = 0.0,
        proportional_attention: bool = True,
    ) -> None:
        self.rounds = None if rounds is None else check_count(rounds, "rounds")
        self.protect = check_number(protect, "protect")
        if self.protect >= 1:
            raise SettingError(f"protect must lie in [0, 1), got {protect!r}")
        self.proportional_attention = bool(proportional_attention)

    def requires(self) -> frozenset[str]:
        """Importance, where some tokens are protected."""
        return frozenset({"importance"} if self.protect else ())

    def prefers(self) -> frozenset[str]:
        """Keys."""
        return frozenset({"keys"})

    def protected(self, patches: int) -> int:
        """How many of the tokens take no part."""
        return int(self.protect * patches)

    def fewest(self, patches: int) -> int:
        """How few tokens it can leave."""
        protected = self.protected(patches)
        if self.rounds is None:
            return protected + 1
        return protected + fewest_after(patches - protected, self.rounds)

    def check(self, patches: int, keep: int) -> None:
        """See :meth:`Merger.check`.

        Raises:
            ValueError: if the rounds cannot leave so few.
        """
        if keep < (fewest := self.fewest(patches)):
            how = f"{self.rounds} rounds that each at most halve" if self.rounds else "this merger"
            beside = f" beside {self.protected(patches)} protected ones" if self.protect else ""
            raise SettingError(
                f"{how}{beside} leave at least {fewest} of {patches} tokens in one block, and"
                f" {keep} are asked for; the lowest keep rate there is {fewest / patches:.3f}:"
                " raise it, take more rounds, protect fewer, or reduce in more blocks"
            )

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`; leaves tokens in the order of their places.

        Raises:
            ValueError: if features are not finite; looked for on a CPU, outside of graphs.
        """
        assert seen.size is not None
        n = seen.size.shape[1]
        protected, part = self.protected(n), None
        if protected:
            assert seen.importance is not None
            rest = rank_order(seen.importance)[:, protected:]
            part = rest.topk(n - protected, dim=1, largest=False, sorted=True).values
        keys = None if seen.keys is None else seen.keys.detach()
        group = ward_plan(seen.x.detach(), keys, seen.size, keep - protected, self.rounds, part)
        return means_of_patches(seen, group, keep)
