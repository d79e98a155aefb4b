"""Share a reduced model: a folder, or a repository of the Hugging Face hub, from which it can be
built again.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from tdm_lightning.core.configurable import arguments_line
from tdm_lightning.errors import FileError
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.version import __version__

#: Version of what stands under :data:`KEY` in ``config.json``.
FORMAT = 1

#: Where our part of ``config.json`` stands; all other entries are timm's.
KEY = "tdm_lightning"

_WEIGHTS, _STRATEGY = "model.safetensors", "strategy.safetensors"


class Shareable(
    ModelHubMixin,
    library_name="tdm-lightning",
    pipeline_tag="image-classification",
    tags=["timm", "vision-transformer", "token-reduction"],
):
    """What huggingface_hub's mixin asks of :class:`~tdm_lightning.TokenReducedViT`; ``push_to_hub``
    is the mixin's.

    A folder holds what timm writes for the unreduced model, ``config.json`` and
    ``model.safetensors``, so that timm can load that (``timm.create_model("hf-hub:USER/NAME",
    pretrained=True)``). The strategy stands in the config beside it, its own weights and masks, if
    any, in ``strategy.safetensors``; the model card is ``README.md``.
    """

    vit: Any
    strategy: Strategy

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: dict[str, Any] | None = None, **kwargs: Any
    ) -> str | None:
        """Write the model to a folder. First it is built again from what would be written, and must
        give the same outputs.

        Args:
            save_directory: the folder, made if need be; a ``README.md`` that is there stays.
            config: entries of ``config.json`` to add or replace: ``label_names``, or
                ``model_args``, the arguments of ``timm.create_model`` where the model does not know
                them any more.
            kwargs: passed to ``ModelHubMixin.save_pretrained``, such as
                ``model_card_kwargs={"license": "apache-2.0"}``.

        Raises:
            ValueError: if the model cannot be built again from its architecture's name and these
                arguments.
            OSError: if the folder cannot be written.
        """
        described = _describe(self, config or {})
        _check_rebuilt(self, described)
        return super().save_pretrained(save_directory, config=described, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        for name, module in ((_WEIGHTS, self.vit), (_STRATEGY, self.strategy)):
            weights = {key: value.contiguous() for key, value in module.state_dict().items()}
            if weights:
                save_file(weights, save_directory / name, metadata={"format": "pt"})
            else:
                (save_directory / name).unlink(missing_ok=True)  # of what was saved here before

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Any:
        """The model of a folder or a repository of the hub, ready for inference.

        Args:
            pretrained_model_name_or_path: what :meth:`save_pretrained` wrote, or a repository,
                ``USER/NAME``.
            force_download: download again what lies in the cache.
            token: for private repositories; by default that of ``hf auth login``.
            cache_dir: folder for downloads.
            local_files_only: use only what has been downloaded before.
            revision: branch, tag or commit.

        Raises:
            ValueError: if there is no such repository within reach, or its files are incomplete, of
                a newer version of this library, for another model, or name a strategy that is not
                imported.
        """
        name = str(pretrained_model_name_or_path)
        if os.path.isdir(name):
            folder = Path(name)
        else:
            try:
                folder = Path(
                    snapshot_download(
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                        allow_patterns=["config.json", _WEIGHTS, _STRATEGY],
                        library_name="tdm-lightning",
                        library_version=__version__,
                    )
                )
            except (OSError, HFValidationError) as error:
                raise FileError(
                    f"{name!r} is neither a folder nor a repository of the hub that can be reached:"
                    f" {error}\nCheck the name and the connection; for a private repository, log in"
                    " with `hf auth login`"
                ) from error
        config = _read_config(folder / "config.json", name)
        model = _build(config, name)
        _fill(model.vit, _read_weights(folder / _WEIGHTS, name), f"{_WEIGHTS} of {name}")
        if (folder / _STRATEGY).exists() or model.strategy.state_dict():
            _fill(model.strategy, _read_weights(folder / _STRATEGY, name), f"{_STRATEGY} of {name}")
        return model.eval()

    def push_to_hub(
        self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, as ``ModelHubMixin.push_to_hub`` does; its
        arguments.

        Returns:
            The address of the commit.
        """
        return super().push_to_hub(
            repo_id, model_card_kwargs={"repo_id": repo_id, **(model_card_kwargs or {})}, **kwargs
        )

    def generate_model_card(
        self, *args: Any, license: str | None = None, repo_id: str = "USER/NAME", **kwargs: Any
    ) -> ModelCard:
        """The model card: what the model is, what it costs, how to load it.

        Args:
            args: none; the mixin's signature.
            license: the licence of the weights, as the hub spells it; ``None``: left open.
            repo_id: the repository to load from.
            kwargs: none; the mixin's signature.
        """
        data = copy.deepcopy(self._hub_mixin_info.model_card_data)
        if license is not None:
            data.license = license
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card(self, repo_id, license)}")


def _describe(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json``."""
    from tdm_lightning.vit.adapters import input_size

    if "architecture" not in (getattr(model.vit, "pretrained_cfg", None) or {}):
        raise FileError(
            f"this {type(model.vit).__name__} was not made by timm.create_model(), so no name says"
            " how to make it again; create one of the same sizes with it and load these weights"
            " into that"
        )
    entries = dict(given)
    arguments = entries.pop("model_args", {})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model.vit, path, model_config=entries, model_args=arguments)  # type: ignore[arg-type]
        config = json.loads(path.read_text(encoding="utf-8"))
    config["pretrained_cfg"]["input_size"] = list(
        input_size(model.vit)
    )  # timm keeps another where the size is free
    dtype = str(next(model.vit.parameters()).dtype).removeprefix("torch.")
    own = {
        "format": FORMAT,
        "version": __version__,
        "dtype": dtype,
        "strategy": model.strategy.config(),
    }
    return {**config, KEY: own}


def _build(config: Mapping[str, Any], origin: str) -> Any:
    """The reduced model of a ``config.json``, its weights random."""
    from tdm_lightning.vit.attach import attach  # which imports the model, which inherits from here

    own = config.get(KEY)
    if not isinstance(own, Mapping):
        raise FileError(
            f"{origin} holds no reduced model: its config.json has no {KEY!r}. For a plain model of"
            " timm's use timm.create_model('hf-hub:…', pretrained=True) and attach()"
        )
    if own.get("format", 0) > FORMAT:
        raise FileError(
            f"{origin} was written by tdm-lightning {own.get('version', '(unknown)')} in format"
            f" {own['format']}, and this release, {__version__}, reads up to format {FORMAT}: pip"
            " install --upgrade tdm-lightning"
        )
    missing = [
        key for key in ("architecture", "num_classes", "pretrained_cfg") if key not in config
    ]
    missing += [f"{KEY}.{key}" for key in ("format", "dtype", "strategy") if key not in own]
    if missing:
        raise FileError(
            f"config.json of {origin} is incomplete: it has no {', '.join(map(repr, missing))}"
        )
    labels = {"label_names": config["label_names"]} if "label_names" in config else {}
    try:
        vit = timm.create_model(
            config["architecture"],
            pretrained_cfg={
                **config["pretrained_cfg"],
                "num_classes": config["num_classes"],
                **labels,
            },
            **{**config.get("model_args", {}), "num_classes": config["num_classes"]},
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise FileError(
            f"timm {timm.__version__} cannot make the {config['architecture']!r} of {origin}:"
            f" {error}"
        ) from error
    try:
        strategy = Strategy.from_config(own["strategy"])
    except (TypeError, ValueError) as error:
        raise FileError(f"the strategy of {origin} cannot be built: {error}") from error
    return attach(vit.to(getattr(torch, own["dtype"])), strategy)


def _fill(module: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(
            f"{origin} does not fit the model that its config describes. {error}"
        ) from error


def _read_config(path: Path, origin: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{origin} has no config.json; save_pretrained() writes one") from error
    except ValueError as error:
        raise FileError(f"config.json of {origin} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileError(
            f"config.json of {origin} holds a {type(config).__name__}, expected entries by name"
        )
    return config


def _read_weights(path: Path, origin: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise FileError(f"{path.name} of {origin} is missing or incomplete: {error}") from error


@torch.no_grad()
def _check_rebuilt(model: Any, config: Mapping[str, Any]) -> None:
    """Refuse a description that gives another model: arguments of ``timm.create_model`` that
    nothing recorded.
    """
    from tdm_lightning.vit.adapters import input_size

    remedy = (
        f"a {config['architecture']} made with {config.get('model_args', {})} is not this model;"
        " say what it was created with: config={'model_args': {…}}"
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # weights are drawn at first, and a run goes on as if nothing had been saved
        rebuilt = _build(config, "what would be written")
    try:
        rebuilt.vit.load_state_dict(model.vit.state_dict())
    except RuntimeError as error:
        raise FileError(f"nothing was written: {remedy}. {error}") from error
    _fill(rebuilt.strategy, model.strategy.state_dict(), "what the strategy has learned")
    # The strategy is built from its own config; what may be wrong is the timm model, also where all
    # shapes agree.
    vit = copy.deepcopy(model.vit).eval()
    like = next(vit.parameters())
    images = torch.randn(2, *input_size(vit), generator=torch.Generator().manual_seed(0)).to(like)
    again = rebuilt.vit.to(like.device).eval()(images)
    if not torch.allclose(vit(images), again, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise FileError(f"nothing was written: {remedy}. All shapes agree, but the outputs do not")


def _card(model: Any, repo_id: str, license: str | None) -> str:
    """The text of the model card."""
    from tdm_lightning.flops import mac_report
    from tdm_lightning.vit.adapters import input_size

    vit, strategy = model.vit, model.strategy
    name, method = vit.pretrained_cfg["architecture"], type(strategy).__name__
    channels, height, width = input_size(vit)
    cost = "depends on the image: every image keeps its own number of tokens"
    if not strategy.adaptive:
        report = mac_report(model)
        cost = (
            f"{report.backbone / 1e9:.2f} per image, {report.plain / 1e9:.2f} without the reduction"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""# {name} with {method}

timm's `{name}`, whose patch tokens tdm-lightning reduces on their way through the blocks.

- **Strategy:** `{method}({arguments_line(strategy.config())})`
- **GMACs:** {cost}
- **Parameters:** {parameters / 1e6:.2f} M
- **Images:** {channels}×{height}×{width}, {vit.num_classes} classes

## Load it

```python
import tdm_lightning as tdm
from timm.data import create_transform, resolve_model_data_config

model = tdm.TokenReducedViT.from_pretrained("{repo_id}")
transform = create_transform(**resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))
```

Without the reduction: `timm.create_model("hf-hub:{repo_id}", pretrained=True)`.

## Licence

{license or "Not stated yet: add `license:` above. The weights it was trained from may bind it."}
"""
