"""The reduced model that a subcommand's settings describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tdm_lightning.strategies import TDM, Strategy
from tdm_lightning.vit import TokenReducedViT, attach


@dataclass(frozen=True)
class Chosen:
    """A reduced model, ready for inference.

    Attributes:
        model: the model.
        config: what is known of it beyond itself, for
            :meth:`~tdm_lightning.TokenReducedViT.save_pretrained`.
    """

    model: TokenReducedViT
    config: dict[str, Any] = field(default_factory=dict)


def choose_model(
    ckpt_path: str | None,
    folder: str | None,
    model: str,
    model_kwargs: dict[str, Any] | None,
    strategy: Strategy | list[Strategy] | None,
    pretrained: bool,
    checkpoint: str | None,
) -> Chosen:
    """Take the model from the first of these that is given.

    Args:
        ckpt_path: a checkpoint of ``tdm fit``; it brings model and strategy along.
        folder: what ``save_pretrained`` wrote, or a repository of the hub; it brings them along
            too.
        model: the name of a timm ViT.
        model_kwargs: passed to ``timm.create_model``.
        strategy: the token-reduction method; ``None``: what was brought along, or TDM at 0.7.
        pretrained: take timm's pretrained weights.
        checkpoint: take the weights in this file.

    Raises:
        ValueError, TypeError, OSError: if something is missing or does not fit.
    """
    if ckpt_path:
        chosen = _from_run(ckpt_path)
    elif folder:
        chosen = Chosen(TokenReducedViT.from_pretrained(folder))
    else:
        return _from_timm(model, model_kwargs or {}, strategy or TDM(), pretrained, checkpoint)
    if strategy is not None:
        chosen = Chosen(attach(chosen.model.vit, strategy), chosen.config)
    chosen.model.eval()
    return chosen


def _from_run(path: str) -> Chosen:
    from tdm_lightning.training.module import TokenReductionClassifier

    module = TokenReductionClassifier.load_from_checkpoint(
        path, map_location="cpu", weights_only=True
    )
    hp: Any = module.hparams
    arguments = {"global_pool": hp.global_pool, **(hp.model_kwargs or {})}
    config = {"model_args": {name: value for name, value in arguments.items() if value is not None}}
    return Chosen(
        module.model, config | ({"label_names": module.label_names} if module.label_names else {})
    )


def _from_timm(
    name: str,
    arguments: dict[str, Any],
    strategy: Strategy | list[Strategy],
    pretrained: bool,
    checkpoint: str | None,
) -> Chosen:
    import timm

    from tdm_lightning.checkpoints import load_official

    reduced = attach(timm.create_model(name, pretrained=pretrained, **arguments), strategy).eval()
    if checkpoint is not None:
        load_official(reduced, checkpoint)
    return Chosen(reduced, {"model_args": arguments})
