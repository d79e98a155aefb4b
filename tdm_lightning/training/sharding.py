"""A module's parameters in shards over all processes: FSDP2 under Lightning's
``ModelParallelStrategy``.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from tdm_lightning.errors import SettingError

# Said of every module that can be sharded, in every run; those that are sharded refuse it.
warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")


def check_strategy(trainer: Trainer) -> None:
    """Refuse the strategies that would flatten the parameters.

    Raises:
        ValueError: under FSDP1.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise SettingError(
            "trainer.strategy=fsdp (FSDP1) flattens the parameters, whose names and shapes the"
            " methods here need; shard them by FSDP2: --config addons/fsdp2"
        )


def shard(module: LightningModule, mesh: Any) -> None:
    """Shard all parameters of a module, in one group; once.

    In one group, because methods that decide image by image run other blocks on other processes: a
    group for each block would wait for processes that never come there. All parameters are whole
    during a training step's passes; gradients, the optimizer's state and the parameters between
    steps are in shards.

    Args:
        module: with all its parameters.
        mesh: Lightning's, of ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: for tensor parallelism, or with a moving average of the weights.
    """
    processes, split = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if split > 1:
        raise SettingError(
            f"this model has no tensor parallelism, and the mesh is {processes} × {split}; set"
            f" trainer.strategy.data_parallel_size={processes * split} and"
            " trainer.strategy.tensor_parallel_size=1"
        )
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            raise SettingError(
                f"{type(callback).__name__} averages whole weights and cannot follow sharded ones;"
                " leave it out of trainer.callbacks, or take trainer.strategy=ddp"
            )
    if isinstance(module, FSDPModule):
        return
    fully_shard(module, mesh=mesh["data_parallel"])
    register_fsdp_forward_method(module, "training_step")
