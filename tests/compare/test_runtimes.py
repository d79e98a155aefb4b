"""``tdm compare`` under other runtimes: the same logits, and what is timed."""

import functools

import pytest
import torch
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.compare import methods, run
from tdm_lightning.compare import runtime as runtimes
from tests.helpers.compares import NAME, SHAPE, Positive, reduced, table
from tests.helpers.compares import compare as compare  # a fixture


@pytest.mark.parametrize("runtime", ["compile", "onnx"])
def test_other_runtimes_give_the_models_logits(runtime, monkeypatch):
    if runtime == "onnx":
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )  # the usual one takes its time
    model = reduced(tdm.EViT(0.5, layers=(1,)), {**SHAPE, "depth": 2}).eval()
    run_model = runtimes.runner(model, runtime)
    for images in torch.randn(3, 3, 32, 32), torch.randn(1, 3, 32, 32):
        with torch.inference_mode():
            found = torch.as_tensor(run_model(images))
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=1e-4)


def test_every_compiled_method_has_graphs_of_its_own(monkeypatch):
    """More models and batch sizes than graphs that one code object may have."""
    compiled = []
    count = functools.partial(
        torch.compile, backend=lambda graph, _: compiled.append(graph) or graph.forward
    )
    monkeypatch.setattr(torch, "compile", count)
    torch._dynamo.reset()
    for width in range(1, 10):
        run_model = runtimes.runner(nn.Linear(width, 2), "compile")
        for batch in (2, 1, 2):
            run_model(torch.zeros(batch, width))
    assert len(compiled) == 2 * 9


def test_other_runtimes_are_timed_only(compare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "runner", lambda model, runtime: model)
    compare("--runtime=compile")
    rows = table(tmp_path)
    assert rows["TDM"]["runtime"].startswith("torch.compile")
    assert float(rows["TDM"]["batch_ms"]) > 0
    assert rows["TDM"]["launches"] == ""
    assert rows["TDM"]["peak_bytes"] == rows["TDM"]["saved_bytes"] == rows["TDM"]["own_time"] == ""
    assert "torch.compile" in capsys.readouterr().out


def test_the_defaults_of_other_runtimes_keep_to_fixed_budgets():
    assert not any(strategy.adaptive for strategy in methods.posters_strategies(static=True))


def test_graphs_are_captured_once_for_each_batch_size(monkeypatch):
    captured = []
    monkeypatch.setattr(
        runtimes, "accelerate", lambda model, images: captured.append(len(images)) or model
    )
    run_model = runtimes.runner(nn.Linear(3, 2), "graph")
    for batch in (2, 1, 2, 1):
        assert run_model(torch.zeros(batch, 3)).shape == (batch, 2)
    assert captured == [2, 1]
    assert runtimes.runtime_name("graph").startswith("a CUDA graph")


@pytest.mark.parametrize("runtime", ["compile", "onnx"])
def test_other_runtimes_refuse_adaptive_methods(runtime):
    with pytest.raises(ValueError, match="Positive keeps another number of tokens for each image"):
        run.prepare(
            NAME, [Positive()], run.Plan(batch_sizes=2, runtime=runtime, device="cpu"), SHAPE
        )


def test_a_method_that_a_runtime_cannot_run_is_named(monkeypatch):
    def runner(model, runtime):
        if model is not compared.methods[0].model:
            raise ValueError("no such operator")
        return model

    compared = run.prepare(
        NAME,
        [tdm.EViT(0.5, layers=(1,))],
        run.Plan(batch_sizes=2, runtime="compile", device="cpu"),
        SHAPE,
    )
    monkeypatch.setattr(run, "runner", runner)
    with pytest.raises(
        ValueError, match="EViT cannot be timed with runtime=compile: no such operator"
    ):
        run.measure(compared)
