"""What is used of other packages beyond their public APIs, each by its name: a release that moves
one of them fails here first.
"""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from tdm_lightning.data.loader import trainer_position
from tests.data.test_sampling import Probe, make_data
from tests.helpers.localsets import make_arrow
from tests.helpers.trainers import QUIET

ROOT = Path(__file__).parents[1]

#: Where something stands, the parameters it is given by name or place, and who uses it.
USED = [
    ("timm.models._hub:save_config_for_hf", "model config_path model_config model_args", "hub.py"),
    ("timm.models._features:feature_take_indices", "num_features indices", "vit/wrapper.py"),
    ("timm.models.vision_transformer:VisionTransformer._pos_embed", "x", "vit/adapters"),
    ("timm.models.vision_transformer:DiffAttention._compute_lambda", "", "vit/adapters"),
    ("timm.models.eva:Eva._pos_embed", "x", "vit/adapters"),
    ("timm.models.beit:Attention._get_rel_pos_bias", "", "vit/adapters"),
    (
        "timm.data.distributed_sampler:RepeatAugSampler",
        "dataset num_replicas rank num_repeats",
        "data/sampling.py",
    ),
    ("datasets:IterableDataset._resolve_features", "", "data/rows.py"),
    ("datasets.data_files:get_data_patterns", "base_path", "data/sources.py"),
    ("datasets.data_files:sanitize_patterns", "patterns", "data/sources.py"),
    (
        "datasets.data_files:DataFilesDict.from_patterns",
        "patterns base_path allowed_extensions",
        "data/sources.py",
    ),
    ("datasets.packaged_modules.imagefolder.imagefolder:ImageFolder", "", "data/sources.py"),
    ("torch.utils._python_dispatch:TorchDispatchMode", "", "compare/memory.py"),
    ("torch:ops.aten.add.Tensor._schema", "", "compare/launches.py"),
    ("torch.utils._pytree:tree_leaves", "tree", "compare/memory.py"),
    ("torch.utils._pytree:tree_map_only", "func tree", "vit/accelerate.py"),
    ("torch.nn:Module._apply", "fn recurse", "vit/accelerate.py"),
    (
        "torch.nn:Module._load_from_state_dict",
        "state_dict prefix error_msgs",
        "strategies/psvit.py",
    ),
    ("torchvision.models:VisionTransformer._process_input", "x", "vit/adapters"),
    ("open_clip.transformer:VisionTransformer._embeds", "x", "vit/adapters"),
    ("transformers:PretrainedConfig._attn_implementation", "", "vit/in_place.py"),
    ("transformers.utils.output_capturing:_active_collector", "", "vit/in_place.py"),
    ("torch._inductor:aoti_compile_and_package", "exported_program package_path", "export/aoti.py"),
    ("torch._inductor:aoti_load_package", "path", "export/aoti.py"),
    ("lightning.pytorch.loops.fit_loop:_FitLoop.batch_idx", "", "data/loader.py"),
]


@pytest.mark.parametrize(("name", "parameters", "user"), USED, ids=[name for name, *_ in USED])
def test_it_is_there(name: str, parameters: str, user: str) -> None:
    module, path = name.split(":")
    found = import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
        assert found is not None, f"{name} is gone, see {user}"
    if parameters:
        there = inspect.signature(found).parameters
        assert set(parameters.split()) <= set(there), f"{name} takes other arguments, see {user}"


#: Attributes of every torch module; their names are in its state since 1.0.
MODULES = {"_modules", "_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"}


def test_every_module_has_them() -> None:
    assert vars(torch.nn.Module()).keys() >= MODULES


def private_names(path: Path) -> set[str]:
    """Underscored names in a file that it does not define itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    names = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and "._" in (node.module or "")
        for alias in node.names
    } | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and ast.unparse(node.value) not in ("self", "cls", "Configurable")
    }
    return {name for name in names if not name.endswith("__")}


def test_no_other_private_name_is_used() -> None:
    known = {name.split(":")[1].split(".")[-1] for name, *_ in USED} | MODULES
    files = [*(ROOT / "tdm_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    for path in files:
        others = private_names(path) - known
        assert not others, f"{path.relative_to(ROOT)} uses {others}: name it in USED"


def test_attributes_of_timms_sampler_and_of_image_folders() -> None:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from timm.data.distributed_sampler import RepeatAugSampler

    sampler = RepeatAugSampler(range(6), num_replicas=2, rank=1, num_repeats=2)
    sampler.epoch = 5
    images = list(sampler)
    sampler.epoch = 6
    assert len(images) == len(sampler) == 3
    assert list(sampler) != images
    assert {"dataset", "rank", "num_replicas", "num_repeats"} <= set(vars(sampler))
    assert {".png", ".jpg", ".jpeg"} <= set(ImageFolder.EXTENSIONS)


def test_what_timm_writes_of_a_model() -> None:
    import timm

    from tdm_lightning.hub import timms_config

    vit = timm.create_model("test_vit", num_classes=3)
    config = timms_config(vit, {"label_names": ["a", "b", "c"]}, {"depth": 4})
    assert config["architecture"] == "test_vit"
    assert config["num_classes"] == 3
    assert config["model_args"]["depth"] == 4
    assert config["label_names"] == ["a", "b", "c"]
    assert config["pretrained_cfg"]["input_size"] == [3, 160, 160]


def test_lightning_tells_the_batch_of_an_epoch(tmp_path: Path) -> None:
    positions = []

    class Positions(Probe):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            positions.append(trainer_position(self.trainer))

    quiet = {"enable_checkpointing": False, "limit_val_batches": 0, "default_root_dir": tmp_path}
    trainer = Trainer(**QUIET, **quiet, max_epochs=2, limit_train_batches=2)
    assert trainer_position(trainer) == (0, 0)
    trainer.fit(Positions(), make_data(tmp_path, make_arrow(tmp_path / "set")))
    assert positions == [(0, 1), (0, 2), (1, 1), (1, 2)]
