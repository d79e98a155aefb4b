"""How different a ViT's tokens still are, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from tdm_lightning.callbacks.batches import is_sampled
from tdm_lightning.callbacks.output import check_folder, output_folder

from tdm_lightning.core.checks import check_choice, check_count
from tdm_lightning.metrics import DiversityRecorder, DiversityScore, Norm
from tdm_lightning.vit.find import find_vit

_STAGES = ("train", "val", "test")


class DiversityMonitor(Callback):
    """Measures the diversity score of the patch tokens after each block (Long et al., CVPR 2023).

    It listens to the passes that the module makes anyway, in a few batches spread evenly over the
    loader; of each, to the first pass. Logged as ``diversity/<stage>/block_XX``, blocks counted
    from 0; printed and plotted (``diversity_<stage>.png``) at the end of the run, not plotted under
    ``fast_dev_run``. Prefix tokens, padding and tokens that wait outside the blocks do not count.

    Args:
        norm: see :func:`~tdm_lightning.metrics.diversity_score`.
        normalize: divide by N·C, to compare models that keep different numbers of tokens.
        max_batches: batches to listen to, per loader, epoch and process.
        stages: of ``"train"``, ``"val"`` and ``"test"``.
        dir: folder for the plot; the logger's by default.
        vit: path of the ViT in the LightningModule, where it holds several.

    Attributes:
        scores: the latest score of each block, by stage.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range; at the start of
            the run, if the module does not hold exactly one ViT, or ``dir`` cannot be written.
    """

    def __init__(
        self,
        norm: Norm = "medoid",
        normalize: bool = False,
        max_batches: int = 8,
        stages: Sequence[str] = ("val", "test"),
        dir: str | None = None,
        vit: str | None = None,
    ) -> None:
        DiversityScore(norm)  # a wrong norm is refused here, before the run
        self.norm: Norm = norm
        self.normalize = normalize
        self.max_batches = check_count(max_batches, "max_batches")
        self.stages = tuple(check_choice(stage, _STAGES, "stages") for stage in stages)
        self.dir = dir
        self.vit = vit
        self.scores: dict[str, list[float]] = {}
        self._recorders: dict[str, DiversityRecorder] = {}
        self._listening = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is one ViT, and a place for the plot."""
        find_vit(pl_module, self.vit)
        check_folder(trainer, self.dir)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._begin(trainer, pl_module, "train")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen, if it is this batch's turn."""
        self._listen(trainer, pl_module, "train", batch_idx, trainer.num_training_batches)

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop listening."""
        self._listening.close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores."""
        self._log(trainer, pl_module, "train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and plot the last scores of the fit."""
        for stage in ("train", "val"):
            self._report(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._begin(trainer, pl_module, "val")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen, if it is this batch's turn."""
        self._listen(trainer, pl_module, "val", batch_idx, trainer.num_val_batches[dataloader_idx])

    def on_validation_batch_end(self, *args: Any) -> None:
        """Stop listening."""
        self._listening.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores."""
        self._log(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and plot the scores, where this is all of the run."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._begin(trainer, pl_module, "test")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen, if it is this batch's turn."""
        self._listen(
            trainer, pl_module, "test", batch_idx, trainer.num_test_batches[dataloader_idx]
        )

    def on_test_batch_end(self, *args: Any) -> None:
        """Stop listening."""
        self._listening.close()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores."""
        self._log(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and plot the scores."""
        self._report(trainer, pl_module, "test")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        self._listening.close()

    def _begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in self.stages:
            self._recorders[stage] = DiversityRecorder(
                pl_module, self.norm, self.normalize, self.vit
            )

    def _listen(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, index: int, total: float
    ) -> None:
        if (
            stage in self.stages
            and not trainer.sanity_checking
            and is_sampled(index, total, self.max_batches)
        ):
            self._listening.enter_context(self._recorders[stage])

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in self.stages or trainer.sanity_checking:
            return
        scores = self._recorders.pop(stage).compute()
        if any(score.isnan() for score in scores):
            rank_zero_warn(
                f"DiversityMonitor saw no tokens in the {stage} batches it listened to: the ViT was"
                " not called, or it was compiled before and runs no hooks"
            )
            return
        self.scores[stage] = [score.item() for score in scores]
        names = [f"diversity/{stage}/block_{block:02d}" for block in range(len(scores))]
        pl_module.log_dict(
            dict(zip(names, scores, strict=True)), sync_dist=True
        )  # equal on all processes already

    def _report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in self.stages or stage not in self.scores:
            return
        scores = self.scores[stage]
        listed = "  ".join(f"{block}: {score:.4g}" for block, score in enumerate(scores))
        pl_module.print(f"diversity score of the patch tokens after each block ({stage})  {listed}")
        folder = output_folder(trainer, self.dir)
        if folder is not None:
            plot_scores(folder / f"diversity_{stage}.png", scores, stage, self.normalize)


def plot_scores(path: Path, scores: Sequence[float], stage: str, normalized: bool = False) -> None:
    """Write a curve of the score over the blocks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(scores)), scores, marker="o")
    axes.set_xlabel("after block (from 0)")
    axes.set_ylabel("diversity per entry" if normalized else "diversity score")
    axes.set_title(f"Patch tokens, {stage}")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
