"""Files that are damaged, or somebody's who means harm: nothing runs, and the error is named."""

import copy
import inspect
import json
import os
import pickle
import random
from contextlib import suppress

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_official, load_weights, open_weights
from tdm_lightning.errors import FileError, SettingError, SettingTypeError, TokenReductionError
from tdm_lightning.vit.create import create_vit
from tests.test_hub import TINY

RUN = {"pytorch-lightning_version": "2.6.0"}


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:torch.quantize")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **TINY).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vit):
    """A shared folder, and the same weights as ``torch.save`` writes them, today and once."""
    folder = tmp_path_factory.mktemp("files")
    tdm.attach(copy.deepcopy(vit), tdm.DyViT(0.5, (1, 2))).save_pretrained(folder / "shared")
    torch.save({"model": vit.state_dict()}, folder / "zip.pth")
    torch.save(
        {"model": vit.state_dict()}, folder / "legacy.pth", _use_new_zipfile_serialization=False
    )
    return folder


def named_or_nothing(action):
    """Whether it was done; an error that is not the library's own goes through."""
    try:
        action()
    except TokenReductionError:
        return False
    return True


# Bytes ----------------------------------------------------------------------------------------


def damaged(content, seed):
    """Cut off, other bytes altogether, or a few of them changed, most near the front."""
    draw = random.Random(seed)
    kind = seed % 4
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        return draw.randbytes(draw.randrange(400))
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 20])):
        end = min(len(content), draw.choice([40, 400, len(content)]))
        changed[draw.randrange(end)] = draw.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "shared/model.safetensors"])
def test_damaged_weights(name, folder, vit, tmp_path):
    content = (folder / name).read_bytes()
    path = tmp_path / f"damaged{os.path.splitext(name)[1]}"
    failed = 0
    for seed in range(60):
        path.write_bytes(damaged(content, seed))
        failed += not named_or_nothing(lambda: load_weights(copy.deepcopy(vit), path))
    assert failed >= 30  # cut off, or of other bytes; a changed weight may be as good as another


def test_damaged_configs(folder, tmp_path):
    content = (folder / "shared" / "config.json").read_bytes()
    (tmp_path / "model.safetensors").symlink_to(folder / "shared" / "model.safetensors")
    failed = 0
    for seed in range(60):
        (tmp_path / "config.json").write_bytes(damaged(content, seed))
        failed += not named_or_nothing(lambda: open_weights(tmp_path))
    assert failed >= 30


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".pth", ".ckpt", ".safetensors"]))
def test_any_bytes(tmp_path_factory, vit, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"any{suffix}"):
        load_weights(vit, path)


@given(code=st.binary(min_size=1, max_size=60), protocol=st.integers(0, 5))
def test_any_program_of_the_pickle_machine(tmp_path_factory, vit, code, protocol):
    path = tmp_path_factory.getbasetemp() / "program.pt"
    path.write_bytes(pickle.dumps({"model": {}}, protocol)[:-1] + code + b".")
    with pytest.raises(FileError, match="program.pt"):
        load_weights(vit, path)


# Contents -------------------------------------------------------------------------------------

WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just({3: torch.zeros(2)}),
    st.builds(torch.zeros, st.sampled_from([(), (2,), (0, 3)])),
)
KEYS = ("model", "model_kwargs", "strategy", "label_names", "num_classes")


@settings(max_examples=25)
@given(value=WRONG, key=st.sampled_from(["model", "model_ema", "state_dict", "a", 3, None]))
def test_contents_of_other_kinds(tmp_path_factory, vit, value, key):
    path = tmp_path_factory.getbasetemp() / "content.pt"
    for content in (value, {key: value}, {key: {"a": value}}, {**RUN, key: value}):
        torch.save(content, path)
        with pytest.raises(FileError):
            load_weights(vit, path)


@settings(max_examples=40)
@given(value=WRONG, key=st.sampled_from(KEYS))
def test_hyperparameters_of_other_kinds(tmp_path_factory, vit, value, key):
    given_ = {"model": "test_vit", "model_kwargs": {}, "strategy": None, key: value}
    path = tmp_path_factory.getbasetemp() / "run.ckpt"
    torch.save({**RUN, "hyper_parameters": given_, "state_dict": vit.state_dict()}, path)
    named_or_nothing(lambda: open_weights(path))
    torch.save({**RUN, "hyper_parameters": value, "state_dict": vit.state_dict()}, path)
    named_or_nothing(lambda: open_weights(path))


@pytest.mark.parametrize(
    "harm",
    [
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to("meta"),
        lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "complex", "meta", "quantized"],
)
def test_a_tensor_that_no_parameter_can_be_leaves_the_model_alone(vit, harm):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    other = {name: torch.full_like(value, 3.0) for name, value in before.items()}
    last = next(reversed(other))
    with pytest.raises(FileError, match=f"sparse, complex.*{last}"):
        load_official(vit, {**other, last: harm(other[last])})
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


# Configs --------------------------------------------------------------------------------------

JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.just(10**40),
    st.floats(-2, 2),
    st.sampled_from(["", "x", "float32", "int64", "Tensor", "tdm_lightning.TDM", "os.system"]),
    st.just([]),
    st.just([[1]]),
    st.just({}),
    st.just({"class_path": "tdm_lightning.TokenMerger"}),
)


def places(config, above=()):
    """Where something stands in a config, as the keys that lead there."""
    steps = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in steps:
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*above, key))


def changed(config, place, value):
    config = copy.deepcopy(config)
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return config


@settings(max_examples=60)
@given(data=st.data())
def test_values_of_other_kinds_in_a_shared_config(tmp_path_factory, folder, data):
    config = json.loads((folder / "shared" / "config.json").read_text())
    value = data.draw(JSON)
    config = changed(config, data.draw(st.sampled_from(list(places(config)))), value)
    spoiled = tmp_path_factory.getbasetemp() / "spoiled"
    spoiled.mkdir(exist_ok=True)
    (spoiled / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "strategy.safetensors"):
        if not (spoiled / name).exists():
            (spoiled / name).symlink_to(folder / "shared" / name)
    named_or_nothing(lambda: open_weights(spoiled))
    named_or_nothing(lambda: tdm.TokenReducedViT.from_pretrained(spoiled))


VALUES = [None, True, -1, 0, 3, 10**40, 0.5, float("nan"), "x", [], [[1]], [None], {}]
VALUES += [{"class_path": "tdm_lightning.TokenMerger"}, {"class_path": "tdm_lightning.TDM"}]
STORED = {"strategy": tdm.Strategy, "merger": tdm.Merger}


@pytest.mark.parametrize("kind", STORED)
def test_arguments_of_other_kinds(kind):
    """Of everything in the library that can be made without one."""
    plain, tried = timm.create_model("test_vit"), set()
    for path, cls in STORED[kind].known().items():
        if not path.startswith("tdm_lightning.") or inspect.isabstract(cls):
            continue
        if any(one.default is one.empty for one in inspect.signature(cls).parameters.values()):
            continue
        made = cls().config()
        for key in made["init_args"]:
            for value in VALUES:
                config = {**made, "init_args": {**made["init_args"], key: value}}
                with suppress(TokenReductionError):
                    found = STORED[kind].from_config(config)
                    tdm.attach(plain, found if kind == "strategy" else tdm.TDM(merger=found))
        tried.add(cls.__name__)
    assert (
        tried
        >= {"strategy": {"TDM", "ToMe", "MCTF", "DiffRate", "SViTE"}, "merger": {"Drop"}}[kind]
    )


@pytest.mark.parametrize(
    "config",
    [None, 3, [], {}, {"class_path": None}, {"class_path": [1]}]
    + [{"class_path": "tdm_lightning.TDM", "init_args": value} for value in (3, [1], "x")],
    ids=str,
)
def test_a_stored_object_of_another_form(config):
    with pytest.raises(SettingTypeError, match="a stored object is written {'class_path'"):
        tdm.Strategy.from_config(config)


# Harm -----------------------------------------------------------------------------------------


class Harm:
    """A pickle that would make a folder."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.ckpt", "model.safetensors"])
def test_a_plain_pickle_never_runs(name, vit, tmp_path):
    victim = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps({"model": Harm(victim)}))
    with pytest.raises(FileError, match=name):
        load_weights(vit, tmp_path / name)
    assert not victim.exists()


@pytest.mark.parametrize("key", KEYS)
def test_hyperparameters_never_run(key, vit, tmp_path):
    victim, path = tmp_path / "ran", tmp_path / "run.ckpt"
    content = {**RUN, "hyper_parameters": {"strategy": None, key: Harm(victim)}}
    torch.save({**content, "state_dict": vit.state_dict()}, path)
    with pytest.raises(FileError, match="could run code"):
        open_weights(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "argument",
    [
        {"trust_remote_code": True},
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"weights_only": False},
    ],
    ids=str,
)
def test_a_shared_config_loads_no_other_file_and_no_code(argument, folder, tmp_path):
    config = json.loads((folder / "shared" / "config.json").read_text())
    config["model_args"].update(argument)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "shared" / "model.safetensors")
    with pytest.raises(FileError, match=f"cannot hold {next(iter(argument))}"):
        tdm.TokenReducedViT.from_pretrained(tmp_path)


def test_code_beside_a_config_of_transformers_never_runs(tmp_path):
    pytest.importorskip("transformers")
    victim = tmp_path / "ran"
    files = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": files}))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(victim)!r})\n")
    with pytest.raises(SettingError, match="cannot hold trust_remote_code"):
        create_vit(f"hf:{tmp_path}", trust_remote_code=True)
    with pytest.raises(SettingError, match="cannot make a 'hf:"):
        create_vit(f"hf:{tmp_path}")
    assert not victim.exists()
