"""What a GPU would tell, tried on a CPU; never how fast something is."""

import json

import pytest
import torch
from torch import Tensor

import tdm_lightning as tdm
from benchmarks.gpu import checks, operations, speeds
from benchmarks.gpu.__main__ import gpu
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.models import Formed, small, strategies
from benchmarks.runner import run
from tdm_lightning.compare import timing
from tdm_lightning.errors import SettingError
from tdm_lightning.ops.kernels.dispatch import in_two_forms

CPU = torch.device("cpu")


def test_the_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_chosen", lambda few: [("TDM", tdm.TDM(0.7, (1, 2)))])
    monkeypatch.setitem(speeds.METHODS, "TDM", lambda: tdm.TDM(0.7, (1, 2)))
    tiny = {"model": "test_vit", "batch": 2, "methods": ("TDM",)}
    cases = [
        speeds.Case("eager", precision=torch.float32, goals={"TDM": 1e9}, counted=True, **tiny),
        speeds.Case("training", mode="training", embeddings=(False,), **tiny),
    ]
    monkeypatch.setattr(speeds, "_TINY", cases)
    usual, out = timing.LEAST_SECONDS, tmp_path / "gpu.json"
    found = run(gpu, ["--device=cpu", "--quick=true", f"--out={out}"])
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert usual == timing.LEAST_SECONDS
    assert torch.__version__ in found["facts"]["versions"]
    assert found["facts"]["forms"] == ["torch"]
    assert found["left out"] == []
    (checked,) = found["correctness"]
    assert checked["ok"], checked
    assert set(checked["checks"]) >= {"forward", "backward", "autocast float16", "graph"}
    assert [entry["ok"] for entry in found["compiled correctness"]] == [True]
    eager, training = found["speed"]
    shown = [(row["method"], row["linear_embedding"]) for row in eager["rows"]]
    assert shown == [
        (method, linear) for linear in (False, True) for method in ("plain", "free slicing", "TDM")
    ]
    for row in (*eager["rows"], *training["rows"]):
        assert row["ms"] > 0
        assert row["ratio_to_plain"] == 1 or row["method"] != "plain"
        assert row["ratio_to_free_slicing"] == 1 or row["method"] != "free slicing"
    assert eager["rows"][1]["mac_ratio"] == eager["rows"][2]["mac_ratio"] > 1
    assert [row.get("ok") for row in eager["rows"]] == [None, None, False, None, None, False]
    assert eager["rows"][2]["launches"] > eager["rows"][0]["launches"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SettingError, match="no cuda device here"):
        run(gpu, [f"--out={tmp_path / 'gpu.json'}"])


def test_a_fault_is_an_entry_and_time_that_is_up_leaves_a_list(tmp_path):
    path, lines = tmp_path / "gpu.json", []
    journal = Journal(path, 1.0, {"device": "none"}, lines.append)

    def fail():
        raise RuntimeError("illegal memory access")

    def last():
        journal.seconds = 0.0
        return {"ok": True}

    tasks = [({"n": 1}, fail), ({"n": 2}, last), ({"n": 3}, fail)]
    journal.section("tried", tasks)
    journal.section("after", [({"n": 4}, fail)])
    found = json.loads(path.read_text())
    assert [entry["ok"] for entry in found["tried"]] == [False, True]
    assert found["tried"][0]["error"] == "RuntimeError: illegal memory access"
    assert found["tried"][0]["where"].startswith("test_gpu.py:")
    assert [left["n"] for left in found["left out"]] == [3, 4]
    assert found["after"] == []
    assert len(lines) == 2
    assert Journal(path, 1.0, {}).left > 50


def test_what_needs_longer_than_is_left_is_left_out(tmp_path):
    journal = Journal(tmp_path / "gpu.json", 0.5, {})
    journal.section("long", [({"n": 1}, dict)], needs=100)
    assert journal.found["left out"] == [{"section": "long", "n": 1}]


def test_tasks_that_cannot_be_made_end_their_section_only(tmp_path):
    def tasks():
        yield {"n": 1}, lambda: {"ok": True}
        raise ValueError("out of memory")

    journal = Journal(tmp_path / "gpu.json", 1.0, {}, lambda line: None)
    journal.section("one", tasks())
    journal.section("two", [({"n": 2}, lambda: {"ok": True})])
    assert [entry["ok"] for entry in journal.found["one"]] == [True, False]
    assert journal.found["one"][1]["error"] == "ValueError: out of memory"
    assert journal.found["two"][0]["n"] == 2


def test_a_wrong_strategy_is_found():
    class Wrong(tdm.TDM):
        """Right on the CPU in float32, wrong elsewhere."""

        def after_block(self, index, tokens):
            if tokens.x.dtype == torch.bfloat16:
                return tokens.replace(x=-tokens.x * float("nan"))
            return tokens

    found = checks._checked(Wrong(0.7, (1, 2)), "torch", CPU)
    assert not found["ok"]
    assert {name for name, check in found["checks"].items() if not check["ok"]} >= {"bfloat16"}
    assert found["checks"]["forward"]["ok"]


def test_every_public_strategy_has_a_small_model():
    found = strategies()
    assert set(found) >= {"TDM", "WardTDM", "EViT", "ToMe", "PSViT", "AViT", "MaMe", "SViTE"}
    for strategy in found.values():
        assert small(strategy).strategy is strategy


def test_the_methods_cost_the_same_and_goals_are_of_methods():
    for name in speeds.METHODS:
        assert speeds._mac_ratio("deit_small_patch16_224", name) == pytest.approx(1.5345, rel=6e-3)
    for case in (*speeds.CASES, *speeds._COMPILED):
        assert set(case.goals) <= set(case.methods) <= set(speeds.METHODS)


@pytest.mark.parametrize(("kernel", "right"), [("torch:neg", True), ("torch:abs", False)])
def test_operations_are_compared_on_what_passes_give_them(kernel, right):
    def form(x: Tensor) -> Tensor:
        return -x

    form.__name__ = f"negated_{right}".lower()
    operation = in_two_forms(kernel, lambda x: None)(form)
    with operations.recorded() as calls, tdm.kernels.use("torch"):
        operation(torch.ones(2, 3))
    ((found, args),) = calls
    assert found is operation
    assert operations._kind(args) == "(float32[2, 3])"
    entry = operations._agree(operation, args)
    assert entry["kernel ran"]
    assert entry["ok"] is right


def test_a_formed_model_chooses_the_form_and_the_precision():
    seen = []

    class Seeing(torch.nn.Linear):
        def forward(self, x):
            seen.append((tdm.kernels.current(), torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    layer, x = Seeing(2, 2), torch.zeros(1, 2)
    assert Formed(layer, "torch")(x).dtype == torch.float32
    assert Formed(layer, "auto", torch.bfloat16)(x).dtype == torch.bfloat16
    assert seen == [("torch", False), ("auto", True)]
