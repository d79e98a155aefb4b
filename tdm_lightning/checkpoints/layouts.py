"""How the published files name their weights. A new family is one more entry in :data:`LAYOUTS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def _none(weights: Weights) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Layout:
    """One family of files.

    Attributes:
        name: what the family is called.
        recognises: whether a file's names belong to it.
        translate: the file's weights under timm's names; those of a strategy's own layers under
            ``strategy.…``, as :class:`~tdm_lightning.TokenReducedViT` names them. What it leaves
            out is not loaded.
        auxiliary: how the names of weights begin, after translation, that only serve training or
            one strategy: a model without them does not need them.
        copies: names, after translation, under which a complete file repeats a weight, each with
            the name that a model gives it which has it only once.
    """

    name: str
    recognises: Callable[[Weights], bool]
    translate: Callable[[Weights], Weights]
    auxiliary: tuple[str, ...] = ()
    copies: Callable[[Weights], dict[str, str]] = _none


def _is_deit(weights: Weights) -> bool:
    return "patch_embed.proj.weight" in weights and any(
        re.match(r"blocks\.\d+\.attn\.qkv\.weight", name) for name in weights
    )


def _from_deit(weights: Weights) -> Weights:
    """DeiT's names are timm's, but for the LayerScale of DeiT III."""
    return {
        re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value for name, value in weights.items()
    }


def _is_dynamicvit(weights: Weights) -> bool:
    return _is_deit(weights) and "score_predictor.0.in_conv.1.weight" in weights


def _with_predictors(weights: Weights) -> Weights:
    """DeiT's names; the predictors belong to the strategy."""
    return {
        f"strategy.{name}" if name.startswith("score_predictor.") else name: w
        for name, w in weights.items()
    }


#: A weight of one head's MLP in a selector of SPViT: what stands before the head, and behind it.
_HEAD = re.compile(r"(.*\bscore_predictor\.\d+\.(?:in|out)_conv\.)(\d+)(\.\d+\..+)")


def _is_spvit(weights: Weights) -> bool:
    return _is_deit(weights) and any(_HEAD.fullmatch(name) for name in weights)


def _heads_of_spvit(weights: Weights) -> dict[str, str]:
    """Every head has the MLP of the first one, in the published code."""
    found = [match.groups() for match in map(_HEAD.fullmatch, weights) if match]
    heads = {head for _, head, _ in found} - {"0"}
    return {
        f"{before}{head}{behind}": f"{before}0{behind}"
        for before, _, behind in found
        for head in heads
    }


def _is_evovit(weights: Weights) -> bool:
    return "patch_embed.proj.weight" in weights and "qks.0.qk.weight" in weights


def _from_evovit(weights: Weights) -> Weights:
    """Queries and keys, values, projections and first norms of all blocks are lists beside the
    blocks there.
    """
    renamed = {}
    for name, value in weights.items():
        if found := re.fullmatch(r"qks\.(\d+)\.qk\.(weight|bias)", name):
            block, kind = found.groups()
            values = weights.get(f"vs.{block}.v.{kind}")
            # Without its values the name stays as it is, and is reported.
            whole = name if values is None else f"blocks.{block}.attn.qkv.{kind}"
            renamed[whole] = value if values is None else torch.cat((value, values))
        elif (
            not re.fullmatch(r"vs\.(\d+)\.v\.(weight|bias)", name)
            or f"qks.{name[3:].replace('.v.', '.qk.')}" not in weights
        ):
            name = re.sub(r"^norms\.(\d+)\.", r"blocks.\1.norm1.", name)
            name = re.sub(r"^projs\.(\d+)\.", r"blocks.\1.attn.proj.", name)
            name = re.sub(r"^norm\.", "fc_norm.", name)
            renamed[re.sub(r"^(head_cls|norm_cls)\.", r"strategy.\1.", name)] = value
    return renamed


def _is_iared2(weights: Weights) -> bool:
    return _is_deit(weights) and "groups.0.agent.qk.weight" in weights


def _from_iared2(weights: Weights) -> Weights:
    """DeiT's names; the blocks are there a second time, group by group, beside the groups'
    interpreters.
    """
    inside = [re.fullmatch(r"groups\.0\.block_list\.(\d+)\..+", name) for name in weights]
    length = 1 + max((int(found[1]) for found in inside if found), default=-1)
    renamed = {}
    for name, value in weights.items():
        if found := re.fullmatch(r"groups\.(\d+)\.block_list\.(\d+)\.(.+)", name):
            group, block, rest = found.groups()
            twin = weights.get(f"blocks.{int(group) * length + int(block)}.{rest}")
            if twin is not None and torch.equal(twin, value):
                continue  # where the two disagree the name stays as it is, and is reported
        renamed[re.sub(r"^groups\.(\d+)\.agent\.", r"strategy.interpreters.\1.", name)] = value
    return renamed


def _is_ours(weights: Weights) -> bool:
    return any(name.startswith("vit.") for name in weights)


def _from_ours(weights: Weights) -> Weights:
    """What :class:`~tdm_lightning.TokenReducedViT` saves."""
    return {name.removeprefix("vit."): value for name, value in weights.items()}


#: Asked in this order, so the most specific come first. EViT, A-ViT and others that add no layer
#: keep DeiT's names.
LAYOUTS: tuple[Layout, ...] = (
    Layout("tdm-lightning", _is_ours, _from_ours, auxiliary=("strategy.kept",)),  # PS-ViT's masks
    Layout(
        "evo-vit", _is_evovit, _from_evovit, auxiliary=("strategy.head_cls.", "strategy.norm_cls.")
    ),
    Layout("dynamicvit", _is_dynamicvit, _with_predictors),
    Layout("spvit", _is_spvit, _with_predictors, copies=_heads_of_spvit),
    Layout("ia-red2", _is_iared2, _from_iared2),
    Layout("deit", _is_deit, _from_deit),
)
