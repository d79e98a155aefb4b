"""What timm's optimizer factory, trainers and feature tools ask of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.vit.adapters import Adapter


class TimmTools:
    """Answers for the timm model inside; names of parameters get the prefix of the attribute that
    they hang on.
    """

    vit: Any
    strategy: Any
    _adapter: Adapter
    _info: ModelInfo

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay, for timm's optimizer factory."""
        names: set[str] = getattr(self.vit, "no_weight_decay", set)()
        own: set[str] = getattr(self.strategy, "no_weight_decay", set)()
        return {f"vit.{name}" for name in names} | {f"strategy.{name}" for name in own}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer grouping, for layer-wise learning-rate decay; a strategy's own parameters
        join the last group.
        """
        groups = self.vit.group_matcher(coarse=coarse)
        return {name: _prefixed(pattern) for name, pattern in groups.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute each block in the backward pass."""
        if hasattr(self.vit, "set_grad_checkpointing"):
            self.vit.set_grad_checkpointing(enable)
        else:  # none of timm's: the pass here recomputes all the same
            self.vit.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The timm model's classifier."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the timm model's classifier, and the strategy's own if it has one."""
        self.vit.reset_classifier(num_classes, global_pool)
        self.strategy.reset_classifier(num_classes)
        self._info = self._adapter.info(self.vit)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Timm's description of the weights and their input."""
        return getattr(self.vit, "pretrained_cfg", {})

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Timm's older name for :attr:`pretrained_cfg`."""
        return self.pretrained_cfg

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return self.vit.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of the classifier's input."""
        return self.vit.head_hidden_size

    @property
    def embed_dim(self) -> int:
        """Width of the tokens."""
        return self._info.width

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without a classifier."""
        return self._info.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens together."""
        return self._info.prefix

    @property
    def feature_info(self) -> Any:
        """Timm's description of the blocks' features."""
        return self.vit.feature_info

    @property
    def global_pool(self) -> str:
        """How the head pools tokens."""
        return self.vit.global_pool


def _prefixed(pattern: Any) -> Any:
    """Timm's group patterns, ``^blocks…`` and the like, for names that begin with ``vit.``."""
    if isinstance(pattern, str):
        # A caret binds only the first of several alternatives, in timm's own patterns too: anchor
        # each.
        return "|".join(rf"^vit\.{part.lstrip('^')}" for part in pattern.split("|"))
    return [(_prefixed(item[0]), item[1]) for item in pattern]
