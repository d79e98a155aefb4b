"""The diversity of a ViT's tokens in any loop: Lightning, Fabric, Hugging Face's Trainer or plain
PyTorch.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from torch import Tensor, nn

from tdm_lightning.metrics import DiversityScore, Norm
from tdm_lightning.vit.adapters import model_info
from tdm_lightning.vit.find import find_vit, hook_blocks, inner_vit


class DiversityRecorder:
    """The diversity score (Long et al., CVPR 2023) of the patch tokens after each block, over the
    passes it listens to.

    It listens while it is entered as a context, to the first pass made inside; the model and its
    outputs are not changed, and no hook stays behind. Prefix tokens do not count, nor do tokens
    that wait outside the blocks, nor rows that only pad images with fewer tokens than others.

    Args:
        module: any module that holds one ViT, reduced or a plain timm model.
        norm: see :func:`~tdm_lightning.metrics.diversity_score`.
        normalize: divide by N·C, to compare models that keep different numbers of tokens.
        vit: path of the ViT in the module, where it holds several.

    Raises:
        ValueError: if the module does not hold exactly one ViT.

    >>> import timm, torch, tdm_lightning as tdm
    >>> vit = timm.create_model("test_vit", img_size=96)
    >>> model = tdm.attach(vit, tdm.TDM(keep_rate=0.5, layers=(1, 3)))
    >>> recorder = DiversityRecorder(model)
    >>> with recorder:
    ...     logits = model(torch.zeros(2, 3, 96, 96))
    >>> len(recorder.compute())
    6
    """

    def __init__(
        self,
        module: nn.Module,
        norm: Norm = "medoid",
        normalize: bool = False,
        vit: str | None = None,
    ) -> None:
        self._vit = find_vit(module, vit)
        inner = inner_vit(self._vit)
        info = model_info(inner)
        self._metrics = [DiversityScore(norm, normalize).to(info.device) for _ in range(info.depth)]
        self._prefix = info.prefix
        self._listening = ExitStack()
        self._heard: set[int] = set()
        self._images = 0

    def __enter__(self) -> DiversityRecorder:
        """Listen to the next pass."""
        self._heard.clear()
        self._images = 0
        self._listening.enter_context(hook_blocks(self._vit, self._see))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Stop listening."""
        self._listening.close()

    def _see(self, block: int, tokens: Tensor, valid: Tensor | None) -> None:
        # Once per context: gradient checkpointing runs blocks again, and some modules make several
        # passes.
        if block in self._heard:
            return
        self._heard.add(block)
        patches = tokens[:, self._prefix :]
        self._images = max(self._images, len(tokens))
        present = len(tokens) if patches.shape[1] else 0
        if present:
            self._metrics[block].update(
                patches, None if valid is None else valid[:, self._prefix :]
            )
        if present < self._images:
            # Where no patch is left, or an image has left its batch, there is no diversity either:
            # score a single token.
            self._metrics[block].update(
                tokens.new_zeros(self._images - present, 1, tokens.shape[2])
            )

    def compute(self) -> list[Tensor]:
        """Mean score per image after each block, over all processes; NaN where nothing was
        heard.
        """
        return [metric.compute() for metric in self._metrics]

    def reset(self) -> None:
        """Forget what was heard."""
        for metric in self._metrics:
            metric.reset()
