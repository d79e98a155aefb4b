"""`tdm models` says what can be reduced, and what cannot."""

from importlib.metadata import requires

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.cli import main
from tdm_lightning.cli.models import EXAMPLES, LIBRARIES, Library, library_of, needs
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.vit.adapters import class_names
from tdm_lightning.vit.create import create_vit
from tdm_lightning.vit.refusals import REFUSED

#: timm's names of models of the classes that are refused.
NAMES = {
    "Cait": "cait_xxs24_224",
    "CoaT": "coat_tiny",
    "ConVit": "convit_tiny",
    "CrossVit": "crossvit_tiny_240",
    "DaVit": "davit_tiny",
    "GlobalContextVit": "gcvit_xxtiny",
    "Hiera": "hiera_tiny_224",
    "LevitDistilled": "levit_128s",
    "MaxxVit": "maxvit_tiny_tf_224",
    "MultiScaleVit": "mvitv2_tiny",
    "PoolingVisionTransformer": "pit_ti_224",
    "SwinTransformer": "swin_tiny_patch4_window7_224",
    "SwinTransformerV2": "swinv2_tiny_window8_256",
    "TNT": "tnt_s_patch16_224",
    "Twins": "twins_svt_small",
    "VOLO": "volo_d1_224",
    "VisionTransformerSAM": "samvit_base_patch16",
    "Xcit": "xcit_nano_12_p16_224",
}


def test_the_command(capsys):
    main(["models"])
    shown = capsys.readouterr().out
    assert "hf:dinov2 " in shown
    assert "SwinTransformer " in shown
    assert all(path.rpartition(".")[2] in shown for path in class_names())


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_is_of_its_class(path):
    library = library_of(path)
    pytest.importorskip(library.name)
    with torch.device("cpu" if library.name == "open_clip" else "meta"):
        vit = create_vit(f"{library.prefix}{EXAMPLES[path]}")
    assert path in {f"{kind.__module__}.{kind.__qualname__}" for kind in type(vit).__mro__}


def test_each_class_that_a_name_can_mean_has_an_example():
    left = {path.rpartition(".")[2] for path in class_names() if path not in EXAMPLES}
    backbones = {"Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone"}
    assert {name for name in left if library_of(name)} <= backbones


def test_least_versions_are_those_that_pip_asks_for():
    lines = [line.replace("-", "_") for line in requires("tdm-lightning")]
    asked = {line.partition(">=")[0]: line for line in lines}
    for library in LIBRARIES:
        if library.least:
            assert f">={library.least}" in asked[library.package]
            assert not library.extra or f'extra == "{library.extra}"' in asked[library.package]


def test_what_is_missing_is_named():
    missing = Library("x", "", "1", "no-such-package", "huggingface", "")
    assert needs(missing) == "≥ 1, pip install 'tdm-lightning[huggingface]'"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name):
    with torch.device("meta"):
        vit = timm.create_model(NAMES[name])
    with pytest.raises(UnsupportedModelError, match=f"of {name}: ") as told:
        tdm.attach(vit, tdm.TDM())
    assert str(told.value).endswith(REFUSED[name])
