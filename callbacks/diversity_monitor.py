"""How different a ViT's tokens still are, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from tdm_lightning.callbacks.batches import batches_in_loader, is_sampled
from tdm_lightning.callbacks.output import check_folder, output_folder

from tdm_lightning.core.checks import check_choice, check_count
from tdm_lightning.metrics import DiversityRecorder, DiversityScore, Norm
from tdm_lightning.visualize.plots import BLUE, new_figure, save
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
        if stage := self._stage(trainer):
            self._recorders[stage] = DiversityRecorder(
                pl_module, self.norm, self.normalize, self.vit
            )

    on_validation_epoch_start = on_test_epoch_start = on_train_epoch_start

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen, if it is this batch's turn."""
        stage, total = self._stage(trainer), batches_in_loader(trainer, dataloader_idx)
        if stage and is_sampled(batch_idx, total, self.max_batches):
            self._listening.enter_context(self._recorders[stage])

    on_validation_batch_start = on_test_batch_start = on_train_batch_start

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop listening; after an exception too."""
        self._listening.close()

    on_validation_batch_end = on_test_batch_end = on_exception = on_train_batch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores."""
        stage = self._stage(trainer)
        if stage is None:
            return
        scores = self._recorders.pop(stage).compute()
        if any(score.isnan() for score in scores):
            rank_zero_warn(
                f"DiversityMonitor saw no tokens in the {stage} batches it listened to: the ViT was"
                " not called, or it was compiled before and runs no hooks"
            )
            return
        self.scores[stage] = [score.item() for score in scores]
        named = {f"diversity/{stage}/block_{block:02d}": s for block, s in enumerate(scores)}
        pl_module.log_dict(named, sync_dist=True)  # equal on all processes already

    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and plot the last scores of the fit."""
        for stage in ("train", "val"):
            self._report(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and plot the scores, where this is all of the run."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and plot the scores."""
        self._report(trainer, pl_module, "test")

    def _stage(self, trainer: Trainer) -> str | None:
        """The stage under way, if it is to be scored."""
        stage = trainer.state.stage
        if stage is None or trainer.sanity_checking:
            return None
        return stage.dataloader_prefix if stage.dataloader_prefix in self.stages else None

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
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = new_figure([f"Patch tokens, {stage}"], width=5, height=3.2)
    axes.plot(range(len(scores)), scores, marker="o", color=BLUE)
    axes.set_xlabel("after block (from 0)")
    axes.set_ylabel("diversity per entry" if normalized else "diversity score")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)
