"""The monitors for Hugging Face's Trainer; needs ``pip install 'tdm-lightning[huggingface]'``."""

from __future__ import annotations

from typing import Any

from tdm_lightning.callbacks.flops_monitor import cost, is_adaptive
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tdm_lightning.core.checks import check_count
from tdm_lightning.metrics import DiversityRecorder, Norm
from tdm_lightning.vit.find import find_vit


class TokenReductionCallback(TrainerCallback):
    """Adds to every evaluation's metrics the diversity score after each block and what a pass
    costs.

    ``eval_diversity/block_XX`` is the mean over the first batches of the evaluation, see
    :class:`~tdm_lightning.callbacks.DiversityMonitor`; ``eval_flops/gmacs``,
    ``eval_flops/reduction`` and ``eval_tokens/block_XX`` are counted as by
    :class:`~tdm_lightning.callbacks.FLOPsMonitor`, but not for strategies that work image by image.
    The metrics stand in the trainer's log history and in what ``evaluate()`` returns.

    Args:
        max_batches: batches to listen to in each evaluation.
        norm: see :func:`~tdm_lightning.metrics.diversity_score`.
        normalize: divide the score by N·C.
        vit: path of the ViT in the model, where it holds several.

    Raises:
        TypeError, ValueError: if ``max_batches`` is no positive integer; when the trainer is made,
            if its model does not hold exactly one ViT.
    """

    def __init__(
        self,
        max_batches: int = 8,
        norm: Norm = "medoid",
        normalize: bool = False,
        vit: str | None = None,
    ) -> None:
        self.max_batches = check_count(max_batches, "max_batches")
        self.norm = norm
        self.normalize = normalize
        self.vit = vit
        self._recorder: DiversityRecorder | None = None
        self._recorded = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the ViT, and listen for an evaluation."""
        self._recorder = DiversityRecorder(kwargs["model"], self.norm, self.normalize, self.vit)
        self._listen()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training passes do not count."""
        self._stop()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation may follow."""
        self._listen()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """On to the next batch, if more are wanted."""
        self._stop()
        self._recorded += 1
        if self._recorded < self.max_batches:
            self._listen()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add to the metrics."""
        assert self._recorder is not None
        found = {
            f"eval_diversity/block_{i:02d}": score.item()
            for i, score in enumerate(self._recorder.compute())
        }
        vit = find_vit(kwargs["model"], self.vit)
        if not is_adaptive(vit):
            found |= {f"eval_{name}": value for name, value in cost(vit).items()}
        kwargs["metrics"].update(found)
        if state.log_history:
            state.log_history[-1].update(found)
        self._recorder.reset()
        self._recorded = 0
        self._listen()

    def _listen(self) -> None:
        assert self._recorder is not None
        self._stop()
        self._recorder.__enter__()

    def _stop(self) -> None:
        assert self._recorder is not None
        self._recorder.__exit__()
