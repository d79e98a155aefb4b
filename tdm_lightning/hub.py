"""Share a reduced model: a folder, or a repository of the Hugging Face hub, from which it can be
built again.

A folder holds what timm writes for the unreduced model, ``config.json`` and ``model.safetensors``,
so that timm can load that (``timm.create_model("hf-hub:USER/NAME", pretrained=True)``). The
strategy stands in the config beside it, its own weights and masks, if any, in
``strategy.safetensors``; the model card is ``README.md``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from tdm_lightning.checkpoints.folder import (
    CONFIG,
    FORMAT,
    KEY,
    STRATEGY,
    WEIGHTS,
    check_config,
    local_folder,
    read_config,
    read_weights,
)
from tdm_lightning.core.configurable import arguments_line
from tdm_lightning.errors import FileError, SettingError, TokenReductionError
from tdm_lightning.flops import mac_report
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.version import __version__
from tdm_lightning.vit import TokenReducedViT, attach
from tdm_lightning.vit.adapters import input_size
from tdm_lightning.vit.create import create_vit

_TAGS = ["timm", "vision-transformer", "token-reduction"]


class Hub:
    """What :class:`~tdm_lightning.TokenReducedViT` shares itself by; see its methods."""

    def save(
        self,
        model: TokenReducedViT,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        license: str | None = None,
        repo_id: str = "USER/NAME",
    ) -> None:
        """See :meth:`tdm_lightning.TokenReducedViT.save_pretrained`."""
        folder = Path(folder)
        try:
            self._write(model, folder, config or {}, license, repo_id)
        except (OSError, SafetensorError) as error:
            raise FileError(f"the model cannot be written to {folder}: {error}") from error

    def _write(
        self,
        model: TokenReducedViT,
        folder: Path,
        config: Mapping[str, Any],
        license: str | None,
        repo_id: str,
    ) -> None:
        described = describe(model, config)
        _check_rebuilt(model, described)
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in ((WEIGHTS, model.vit), (STRATEGY, model.strategy)):
            weights = {key: value.contiguous() for key, value in module.state_dict().items()}
            if weights:
                save_file(weights, folder / name, metadata={"format": "pt"})
            else:
                (folder / name).unlink(missing_ok=True)  # of what was saved here before
        text = json.dumps(described, sort_keys=True, indent=2)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        if not (folder / "README.md").exists():
            model_card(model, license, repo_id).save(folder / "README.md")

    def load(self, name: str | Path, **download: Any) -> TokenReducedViT:
        """See :meth:`tdm_lightning.TokenReducedViT.from_pretrained`."""
        origin = str(name)
        folder = local_folder(origin, **download)
        model = _build(read_config(folder, origin), origin)
        _fill(model.vit, read_weights(folder, WEIGHTS, origin), f"{WEIGHTS} of {origin}")
        if (folder / STRATEGY).exists() or model.strategy.state_dict():
            weights = read_weights(folder, STRATEGY, origin)
            _fill(model.strategy, weights, f"{STRATEGY} of {origin}")
        return model.eval()

    def push(
        self,
        model: TokenReducedViT,
        repo_id: str,
        config: Mapping[str, Any] | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        **commit: Any,
    ) -> str:
        """See :meth:`tdm_lightning.TokenReducedViT.push_to_hub`."""
        api = HfApi(token=token, library_name="tdm-lightning", library_version=__version__)
        with TemporaryDirectory() as folder:
            self.save(model, folder, config, license, repo_id)
            created = api.create_repo(repo_id, private=private, exist_ok=True)
            commit.setdefault("commit_message", "Push model using tdm-lightning")
            return api.upload_folder(repo_id=created.repo_id, folder_path=folder, **commit)


def model_card(
    model: TokenReducedViT, license: str | None = None, repo_id: str = "USER/NAME"
) -> ModelCard:
    """The model card: what the model is, what it costs, how to load it.

    Args:
        model: the reduced model.
        license: the licence of the weights, as the hub spells it; ``None``: left open.
        repo_id: the repository to load from.
    """
    data = ModelCardData(
        library_name="tdm-lightning",
        pipeline_tag="image-classification",
        tags=_TAGS,
        license=license,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card(model, repo_id, license)}")


def timms_config(vit: nn.Module, entries: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """What timm writes to ``config.json``: by a private function of timm's, which a test names.

    Args:
        vit: the timm model.
        entries: to add or replace.
        arguments: of ``timm.create_model``.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(vit, path, model_config=dict(entries), model_args=arguments)  # type: ignore[arg-type]
        return json.loads(path.read_text(encoding="utf-8"))


def describe(model: TokenReducedViT, given: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        ValueError: if the model was not made by its name.
    """
    if "architecture" not in (getattr(model.vit, "pretrained_cfg", None) or {}):
        raise FileError(
            f"this {type(model.vit).__name__} was not made by timm.create_model(), so no name says"
            " how to make it again; create one of the same sizes with it and load these weights"
            " into that"
        )
    entries = dict(given)
    config = timms_config(model.vit, entries, entries.pop("model_args", {}))
    # timm keeps another size where the size is free.
    config["pretrained_cfg"]["input_size"] = list(input_size(model.vit))
    dtype = str(next(model.vit.parameters()).dtype).removeprefix("torch.")
    own = {
        "format": FORMAT,
        "version": __version__,
        "dtype": dtype,
        "strategy": model.strategy.config(),
    }
    return {**config, KEY: own}


def _build(config: Mapping[str, Any], origin: str) -> TokenReducedViT:
    """The reduced model of a ``config.json``, its weights random."""
    check_config(config, origin)
    own = config[KEY]
    dtype = getattr(torch, own["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FileError(f"{KEY}.dtype in config.json of {origin} is no type: {own['dtype']!r}")
    labels = {"label_names": config["label_names"]} if "label_names" in config else {}
    classes = {"num_classes": config["num_classes"]}
    try:
        vit = create_vit(
            config["architecture"],
            pretrained_cfg={**config["pretrained_cfg"], **classes, **labels},
            **{**config.get("model_args", {}), **classes},
        )
    except SettingError as error:
        raise FileError(f"the model of {origin} cannot be made: {error}") from error
    try:
        strategy = Strategy.from_config(own["strategy"])
    except TokenReductionError as error:
        raise FileError(f"the strategy of {origin} cannot be built: {error}") from error
    return attach(vit.to(dtype), strategy)


def _fill(module: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(
            f"{origin} does not fit the model that its config describes. {error}"
        ) from error


@torch.no_grad()
def _check_rebuilt(model: Any, config: Mapping[str, Any]) -> None:
    """Refuse a description that gives another model: arguments of ``timm.create_model`` that
    nothing recorded.
    """
    remedy = (
        f"a {config['architecture']} made with {config.get('model_args', {})} is not this model;"
        " say what it was created with: config={'model_args': {…}}"
    )
    # Weights are drawn at first, and a run goes on as if nothing had been saved.
    with torch.random.fork_rng(devices=[]):
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
