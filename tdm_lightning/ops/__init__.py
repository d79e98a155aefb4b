"""Pure tensor functions: the arithmetic of token reduction, without any model."""

from tdm_lightning.ops.alternating import match_alternating
from tdm_lightning.ops.attention import biased_attention
from tdm_lightning.ops.clusters import cluster_density_peaks, pairwise_distances
from tdm_lightning.ops.combine import combine
from tdm_lightning.ops.criteria import match_both_ways
from tdm_lightning.ops.decouple import decouple, decoupled
from tdm_lightning.ops.energy import match_by_energy, token_energy
from tdm_lightning.ops.importance import class_attention, class_importance, received_attention
from tdm_lightning.ops.linear import linear_bias, linear_weight
from tdm_lightning.ops.merge import (
    first_members,
    gather_tokens,
    inverse_order,
    joined,
    mean_positions,
    merge_groups,
    rank_order,
    share_group,
    unmerge,
)
from tdm_lightning.ops.mutual import mutual_neighbours
from tdm_lightning.ops.pairs import match_pairs
from tdm_lightning.ops.policy import policy_softmax
from tdm_lightning.ops.ragged import pack
from tdm_lightning.ops.rounds import fewest_after
from tdm_lightning.ops.spread import spread_weights
from tdm_lightning.ops.sums import group_totals
from tdm_lightning.ops.ward import ward_groups, ward_leaders, ward_plan

__all__ = [
    "biased_attention",
    "class_attention",
    "class_importance",
    "cluster_density_peaks",
    "combine",
    "decouple",
    "decoupled",
    "fewest_after",
    "first_members",
    "gather_tokens",
    "group_totals",
    "inverse_order",
    "joined",
    "linear_bias",
    "linear_weight",
    "match_alternating",
    "match_both_ways",
    "match_by_energy",
    "match_pairs",
    "mean_positions",
    "merge_groups",
    "mutual_neighbours",
    "pack",
    "pairwise_distances",
    "policy_softmax",
    "rank_order",
    "received_attention",
    "share_group",
    "spread_weights",
    "token_energy",
    "unmerge",
    "ward_groups",
    "ward_leaders",
    "ward_plan",
]
