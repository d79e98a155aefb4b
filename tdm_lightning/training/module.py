"""The LightningModule: a timm ViT, a token-reduction strategy and the DeiT recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tdm_lightning.checkpoints import load_weights
from tdm_lightning.core import Output
from tdm_lightning.core.randomness import given_seed, reseed
from tdm_lightning.errors import FileError, SettingError, UnsupportedModelError, did_you_mean
from tdm_lightning.flops import step_flops
from tdm_lightning.strategies import Strategy
from tdm_lightning.strategies.stack import stacked
from tdm_lightning.training.finite import check_loss
from tdm_lightning.training.recipe import drop_odd, freeze, make_cosine, make_criterion
from tdm_lightning.training.sharding import check_strategy, shard
from tdm_lightning.training.whole import write_whole
from tdm_lightning.vit import TokenReducedViT, attach
from tdm_lightning.vit.create import create_vit

Batch = tuple[Tensor, Tensor]


class TokenReductionClassifier(LightningModule):
    """Trains and evaluates a timm ViT that reduces its tokens. Batches are ``(images B×C×H×W,
    labels B)``.

    The defaults are DeiT's recipe (Touvron et al., 2021). Meant to be subclassed: override one of
    the ``configure_*`` methods, or a step. The reduced model is ``self.model``, a
    :class:`~tdm_lightning.TokenReducedViT`.

    In a run that was seeded (``seed_everything``) a training step's random numbers (mixup,
    drop-path, sampled tokens) follow from the seed, the process, the epoch and the batch: a run
    that goes on from a checkpoint draws what it would have drawn.

    Logged: ``train/loss`` and each term of it by name, what the strategy reports, ``val/loss``,
    ``val/top1``, ``val/top5``, and the same for ``test``.

    Args:
        model: name of a ViT (timm's, ``torchvision:…``), or the module itself. A module is not
            stored in checkpoints' hyperparameters: pass it again to ``load_from_checkpoint``.
        strategy: the token-reduction method, or several as :func:`~tdm_lightning.attach` takes
            them; ``None`` trains the plain model.
        num_classes: number of classes; ``None``: the timm model's own.
        label_names: what the classes are called, for :meth:`predict_step`.
        weights: what to start from: ``true`` for timm's pretrained weights, a file (an official
            checkpoint of a method or of DeiT, one of this class), a folder that
            ``save_pretrained`` wrote, or a repository of the hub.
        global_pool: how timm's head pools tokens, such as ``"avg"``; ``None``: the model's own.
        model_kwargs: passed to ``timm.create_model``, such as ``img_size`` or ``in_chans``.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        optimizer: timm's name of the optimizer.
        lr: learning rate at the global batch size used; DeiT's is 5e-4 per 512 images. Lightning's
            ``LearningRateFinder`` may replace it before training: the optimizer and its schedule
            are then made anew.
        weight_decay: decay of all weights but biases, norms, class token and position embedding.
        layer_decay: factor on the learning rate per block towards the input; ``None``: none.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the cosine.
        mixup: mixup's α; 0 turns it off.
        cutmix: cutmix's α; 0 turns it off.
        label_smoothing: share of the target spread over all classes.
        train_in_eval_mode: keep the ViT in eval mode (no drop-path, no dropout) while training, as
            EViT fine-tunes.

    Raises:
        TypeError, ValueError: if the model cannot be reduced or the strategy does not fit it, see
            :func:`tdm_lightning.attach`.
    """

    model: TokenReducedViT

    def __init__(
        self,
        model: str | nn.Module = "deit_small_patch16_224",
        strategy: Strategy | list[Strategy] | None = None,
        num_classes: int | None = None,
        label_names: list[str] | None = None,
        weights: bool | str | None = None,
        global_pool: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        drop_path: float = 0.1,
        optimizer: str = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        warmup_epochs: float = 5,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
        train_in_eval_mode: bool = False,
    ) -> None:
        super().__init__()
        optimizers = [str(name) for name in list_optimizers()]
        if optimizer.lower().rpartition("_")[2] not in optimizers:  # lookahead_NAME too
            hint = did_you_mean(optimizer, optimizers)
            raise SettingError(f"timm has no optimizer {optimizer!r}{hint}")
        if isinstance(strategy, Mapping):  # the stored form, from a checkpoint's hyperparameters
            strategy = Strategy.from_config(strategy)
        strategy = None if strategy is None else stacked(strategy)
        self.save_hyperparameters(
            ignore=["strategy"] if isinstance(model, str) else ["strategy", "model"]
        )
        self.model = self.configure_vit(model, Strategy() if strategy is None else strategy)
        self.save_hyperparameters({"strategy": None if strategy is None else strategy.config()})
        self.classes = self.model.num_classes
        self.label_names = label_names
        self.mixing = self.configure_mixing()
        self.criterion = self.configure_criterion()
        self.train_metrics = self.configure_metrics("train/")
        self.val_metrics = self.configure_metrics("val/")
        self.test_metrics = self.configure_metrics("test/")
        self._input_shape: tuple[int, ...] | None = None  # shape of the images seen last
        self._flops: tuple[tuple[Any, ...], int] | None = (
            None  # what they depend on, and the latest
        )
        self._teacher: tuple[
            nn.Module, ...
        ] = ()  # in a tuple, so that it is no part of the module or its checkpoints

    # What a subclass may replace

    def configure_vit(self, model: str | nn.Module, strategy: Strategy) -> TokenReducedViT:
        """Create the timm model, load its starting weights and attach the strategy."""
        hp: Any = self.hparams
        if isinstance(model, str):
            arguments = {
                "drop_path_rate": hp.drop_path,
                "num_classes": hp.num_classes,
                "global_pool": hp.global_pool,
            }
            arguments = {name: value for name, value in arguments.items() if value is not None} | (
                hp.model_kwargs or {}
            )
            model = create_vit(model, hp.weights is True, **arguments)
        reduced = attach(model, strategy)
        if not isinstance(reduced, TokenReducedViT):
            raise UnsupportedModelError(
                f"{type(model).__name__} runs itself and has no classifier here: train it in"
                " transformers' Trainer, as examples/huggingface.py does, or take timm's model"
            )
        if hp.num_classes not in (None, reduced.num_classes):
            reduced.reset_classifier(hp.num_classes)
        if isinstance(hp.weights, str):
            load_weights(reduced, hp.weights)
        return reduced

    def configure_mixing(self) -> Mixup | None:
        """Mixup and cutmix on batches, which also smooth the labels; ``None`` where both are
        off.
        """
        hp: Any = self.hparams
        if not (hp.mixup or hp.cutmix):
            return None
        return Mixup(
            hp.mixup, hp.cutmix, label_smoothing=hp.label_smoothing, num_classes=self.classes
        )

    def configure_criterion(self) -> nn.Module:
        """The task loss of training."""
        return make_criterion(self.mixing is not None, self.hparams["label_smoothing"])

    def configure_metrics(self, prefix: str) -> MetricCollection:
        """Top-1 and top-5 accuracy."""
        top1 = MulticlassAccuracy(self.classes, top_k=1, average="micro")
        top5 = MulticlassAccuracy(self.classes, top_k=min(5, self.classes), average="micro")
        return MetricCollection({"top1": top1, "top5": top5}, prefix=prefix)

    def configure_teacher(self) -> nn.Module:
        """The frozen, unreduced model for strategies that learn from one: the starting weights.

        Raises:
            ValueError: if the model started from random weights.
        """
        if not self.hparams["weights"] and "model" in self.hparams:
            raise SettingError(
                f"{type(self.model.strategy).__name__} learns from a trained, unreduced model, but"
                " these weights are random; set model.weights to true or a file (on resuming too)"
            )
        teacher = attach(copy.deepcopy(self.model.vit), Strategy())
        return teacher.requires_grad_(False).eval()

    def configure_optimizers(self) -> Any:
        """Timm's optimizer with its no-decay and layer-decay groups, and a cosine per step."""
        hp: Any = self.hparams
        groups = self.model.objective.param_groups(self.model, hp.lr, hp.weight_decay)
        shared = {"opt": hp.optimizer, "lr": hp.lr, "weight_decay": hp.weight_decay}
        if groups is None:
            optimizer = create_optimizer_v2(self.model, layer_decay=hp.layer_decay, **shared)
        else:
            optimizer = create_optimizer_v2(groups, **shared)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise SettingError(
                "the cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps"
            )
        warmup = round(hp.warmup_epochs * self._steps_per_epoch()) if hp.warmup_epochs else 0
        if self.trainer.fast_dev_run and warmup >= steps:  # type: ignore[attr-defined]
            rank_zero_info(f"fast_dev_run: {int(steps) - 1} steps of warm-up in place of {warmup}")
            warmup = int(steps) - 1
        scheduler = make_cosine(optimizer, int(steps), warmup, hp.warmup_lr, hp.min_lr)
        freeze(optimizer.param_groups, self.current_epoch)
        self._scheduled_lr = hp.lr
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _steps_per_epoch(self) -> float:
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        return (
            math.ceil(steps) if steps < float("inf") else steps
        )  # the last batches of an epoch make a step, however few

    # Cost

    @property
    def flops_per_batch(self) -> int:
        """Floating-point operations of the latest batch, as Lightning's ``ThroughputMonitor`` wants
        them; without a teacher's.

        Counted again when the keep rate has moved by a hundredth.

        Raises:
            AttributeError: before the first batch, and where the number of tokens depends on the
                images: then the monitor leaves them out.
        """
        if self._input_shape is None or self.model.strategy.adaptive:
            raise AttributeError(
                "flops_per_batch is known after a batch, and where each image keeps equally many"
                " tokens"
            )
        rate = self.model.strategy.current_keep_rate
        key = (self._input_shape, self.model.training, None if rate is None else round(rate, 2))
        if self._flops is None or self._flops[0] != key:
            self._flops = (key, step_flops(self.model, self._input_shape))
        return self._flops[1]

    # Training

    def forward(self, images: Tensor) -> Tensor:
        """Logits, B×classes."""
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Make the teacher before a checkpoint is restored over the starting weights, and before
        the parameters are sharded; have checkpoints written as
        :class:`~tdm_lightning.training.whole.WholeCheckpoints` does.
        """
        check_strategy(self.trainer)
        write_whole(self.trainer)
        if stage == "fit" and self.model.strategy.requires().teacher and not self._teacher:
            self._teacher = (self.configure_teacher(),)

    def configure_model(self) -> None:
        """Shard the parameters under ``ModelParallelStrategy`` (FSDP2); otherwise nothing."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    def on_train_start(self) -> None:
        """Follow a learning rate that was found since the optimizer was made; keep the ViT in eval
        mode where asked for.
        """
        if self.hparams["lr"] != self._scheduled_lr:
            self.trainer.strategy.setup_optimizers(self.trainer)
        self._set_mode()  # a run that goes on within an epoch does not start one

    def on_train_epoch_start(self) -> None:
        """Keep the ViT in eval mode where asked for; the strategy trains all the same."""
        self._set_mode()

    def _set_mode(self) -> None:
        if self.hparams["train_in_eval_mode"]:
            self.model.vit.eval()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Give a seeded run this step's random numbers; tell the strategy where training stands."""
        if isinstance(self, FSDPModule):
            self.reshard()  # after a validation
        seed = given_seed()
        if seed is not None:
            reseed(seed, self.global_rank, self.current_epoch, batch_idx)
        self.model.objective.on_progress(
            self.current_epoch, self.global_step, int(self.trainer.estimated_stepping_batches)
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step on ``(images B×C×H×W, labels B)``; the sum of the strategy's loss terms.

        Raises:
            ValueError: if that is not finite, see :func:`tdm_lightning.training.finite.check_loss`.
        """
        images, target = batch
        if self.mixing is not None and len(images) > 1:
            images, target = self.mixing(*drop_odd(images, target))
        elif self.mixing is not None:
            target = F.one_hot(target, self.classes).float()
        self._input_shape = tuple(images.shape)
        objective = self.model.objective
        output = self.model.run(images, logits_alone=objective.reads_logits_alone())
        terms = objective.loss(output, target, self.criterion, self._teacher_output(images))
        rates = [group["lr"] for one in self.trainer.optimizers for group in one.param_groups]
        place = f"step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})"
        check_loss(terms, self.model.strategy, rates, place)
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss, prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"train/{name}": value for name, value in terms.items()})
        report = self.model.objective.report(output, target)
        self.log_dict({f"train/{name}": value for name, value in report.items()})
        if target.ndim == 1:
            self.log_dict(
                self._update_metrics(self.train_metrics, output.logits, target),
                on_step=False,
                on_epoch=True,
            )
        return loss

    def _teacher_output(self, images: Tensor) -> Output | None:
        if not self._teacher:
            return self.model.objective.second_pass(self.model, images)
        with torch.no_grad():
            teacher: Any = self._teacher[0].to(images.device)
            alone = self.model.objective.reads_logits_alone()
            return teacher.run(images, logits_alone=alone)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Timm's schedulers count updates themselves; others (a learning rate finder's) are
        torch's.
        """
        if not isinstance(scheduler, Scheduler):
            return super().lr_scheduler_step(scheduler, metric)
        scheduler.step_update(num_updates=self.global_step)
        freeze(scheduler.optimizer.param_groups, int(self.global_step / self._steps_per_epoch()))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step; then the strategy has its say on the weights."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.model.objective.after_optimizer_step(
            self.model, self.global_step + 1, int(self.trainer.estimated_stepping_batches)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget where the weights started: loading a checkpoint must not need another file or a
        download.
        """
        checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).pop("weights", None)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's.

        Raises:
            ValueError: if the weights do not fit, instead of a ``RuntimeError``.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            raise FileError(_mismatch_message(self, state_dict)) from error

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        """Hold sharded parameters whole while evaluating, so that processes with unequally many
        images need not wait for each other.
        """
        if isinstance(self, FSDPModule):
            self.unshard()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Batch, stage: str, metrics: MetricCollection) -> None:
        images, labels = batch
        self._input_shape = tuple(images.shape)
        logits = self(images)
        self.log(
            f"{stage}/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels)
        )
        self.log_dict(
            self._update_metrics(metrics, logits, labels),
            on_step=False,
            on_epoch=True,
            prog_bar=stage == "val",
            batch_size=len(labels),
        )

    @staticmethod
    def _update_metrics(
        metrics: MetricCollection, logits: Tensor, labels: Tensor
    ) -> dict[str, Any]:
        metrics.update(logits.detach(), labels)
        return dict(metrics.items(keep_base=False))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Probabilities B×classes, the most probable class of each image, B, and its name."""
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        probabilities = self(images).softmax(dim=-1)
        label = probabilities.argmax(dim=-1)
        names = [
            self.label_names[index] if self.label_names else str(index) for index in label.tolist()
        ]
        return {"probabilities": probabilities, "label": label, "name": names}


def _mismatch_message(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """What does not fit, by name, in one line."""
    own = module.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)} in the file and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    missing = [f"{name} is not in the file" for name in own if name not in weights]
    unknown = [f"{name} is only in the file" for name in weights if name not in own]
    found = [*shapes, *missing, *unknown]
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"the checkpoint's weights do not fit this model: {'; '.join(found[:3])}{more}. Give model"
        " and strategy as they were trained, or leave both to the checkpoint"
    )
