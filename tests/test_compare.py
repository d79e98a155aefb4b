"""``tdm compare``: what it counts and how it measures; never how fast something is."""

import csv
import dataclasses
import functools
import json
import math

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.cli import main
from tdm_lightning.compare import memory, methods, run, timing
from tdm_lightning.compare import runtime as runtimes
from tdm_lightning.compare.table import Spread

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
NAME = "deit_tiny_patch16_224"
STRATEGIES = [
    {"class_path": "TDM", "init_args": {"keep_rate": 0.5, "layers": [1]}},
    {"class_path": "EvoViT", "init_args": {"layers": [2]}},
    {"class_path": "ToMe", "init_args": {"r": 2}},
]


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)


@pytest.fixture
def compare(tmp_path):
    def call(*extra, strategies=STRATEGIES, shape=SHAPE, rounds=2):
        out = tmp_path / "out"
        arguments = [f"--model={NAME}", f"--model_kwargs={json.dumps(shape)}", f"--strategies={json.dumps(strategies)}"]
        arguments += [f"--rounds={rounds}", "--warmup=1", "--batch_size=2", "--device=cpu", f"--out={out}"]
        main(["compare", *arguments, *extra])

    return call


def table(tmp_path):
    with (tmp_path / "out/compare.csv").open(encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def reduced(strategy, shape=SHAPE):
    return tdm.attach(timm.create_model(NAME, **shape), strategy)


# The command


def test_table_in_three_forms(compare, tmp_path, capsys):
    compare()
    rows = table(tmp_path)
    assert list(rows) == ["plain", "TDM", "EvoViT", "ToMe"]
    expected = {
        "plain": reduced(tdm.Strategy()),
        "TDM": reduced(tdm.TDM(0.5, (1,))),
        "EvoViT": reduced(tdm.EvoViT(layers=(2,)), {**SHAPE, "global_pool": "avg"}),
        "ToMe": reduced(tdm.ToMe(2)),
    }
    for name, model in expected.items():
        row = rows[name]
        assert int(row["macs"]) == tdm.flops.count_macs(model)
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        assert float(row["reduction"]) == 1 - int(row["macs"]) / int(rows["plain"]["macs"])
        assert float(row["images_per_second_q1"]) <= float(row["images_per_second"]) <= float(row["images_per_second_q3"])
        assert float(row["batch1_ms"]) > 0
        assert int(row["peak_bytes"]) > 4 * int(row["parameters"])
        assert row["top1"] == ""
        for version in (torch.__version__, timm.__version__, tdm.__version__):
            assert version in row["versions"]
        assert row["device"].startswith("cpu: ")
        assert row["CPU threads"] == "1"
    assert float(rows["plain"]["ratio_to_plain"]) == 1

    text, printed = (tmp_path / "out/compare.md").read_text(encoding="utf-8"), capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    for word in ("random weights", "float32", "2 interleaved rounds", "EvoViT", "keep_rate=0.5, layers=[1]"):
        assert word in text
        assert word in printed
    assert "top-1" not in text
    with Image.open(tmp_path / "out/compare.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(2**20)) > len(rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.md", "compare.png"]


def test_every_setting_is_solved_to_the_budget(compare, tmp_path):
    plain = tdm.flops.count_macs(timm.create_model(NAME, **SHAPE))
    budget = 0.8 * plain
    compare(f"--match-gmacs={budget / 1e9}", rounds=1)
    rows = table(tmp_path)
    assert int(rows.pop("plain")["macs"]) == plain
    for row in rows.values():
        assert 0.9 * budget < int(row["macs"]) <= budget
    assert "solved for" in rows["TDM"]["budget"]
    assert rows["TDM"]["settings"].startswith("keep_rate=0.")


@pytest.mark.parametrize(("rounds", "calls"), [(2, 3 * 8), (0, 9), (0, 3)], ids=["later", "first", "warm-up"])
def test_an_interrupt_keeps_complete_rounds(compare, tmp_path, monkeypatch, rounds, calls):
    """Four methods take eight timings a round."""
    left = iter(range(calls))

    def seconds(model, images, passes=1):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return 0.5 if isinstance(model, tdm.TokenReducedViT) else 1.0

    monkeypatch.setattr(timing, "seconds", seconds)
    with pytest.raises(SystemExit) as stop:
        compare(rounds=5)
    assert stop.value.code == 130
    assert f"interrupted after {rounds} of 5 rounds" in (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/compare.png").exists()
    for name, row in table(tmp_path).items():
        assert int(row["macs"]) > 0
        assert int(row["peak_bytes"]) > 0
        assert row["ratio_to_plain"] == ("" if not rounds else "1.0" if name == "plain" else "2.0")


def test_an_interrupt_of_the_memory_measurement(compare, tmp_path, monkeypatch):
    def peak_bytes(model, images):
        if isinstance(model, tdm.TokenReducedViT):
            raise KeyboardInterrupt
        return 1

    monkeypatch.setattr(run, "peak_bytes", peak_bytes)
    with pytest.raises(SystemExit):
        compare()
    assert [row["peak_bytes"] for row in table(tmp_path).values()] == ["1", "", "", ""]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model=deit_smal_patch16_224", "did you mean deit_small_patch16_224"),
        ("--model=test_resnet", "cannot reduce"),
        ("--rounds=0", "rounds must be at least 1"),
        ("--warmup=-1", "warmup must be at least 0"),
        ("--batch_size=0", "batch_size must be at least 1"),
        ("--dtype=float8", "dtype must be one of 'float32'"),
        ("--device=abacus", "device must be"),
        ("--device=cpu:0:1", "device must be"),
        ("--match_gmacs=0", "must be a positive number"),
        ("--match_gmacs=0.00001", "cannot meet"),
        ('--strategies=[{"class_path":"TDM"}]', r"TDM\(keep_rate=0.7\) does not fit deit_tiny.* layers \[6, 9\] do not exist"),
        ('--strategies=[{"class_path":"Strategy"}]', None),
        ("--runtime=tensorrt", "runtime must be one of 'eager'"),
        (["--runtime=onnx", "--dtype=bfloat16"], "runtime=onnx runs on the CPU in float32"),
        (["--runtime=compile", "--training=true"], "training steps are timed with runtime=eager"),
        ("--ckpt=missing.pth", "missing.pth"),
        ("--data.dataset=digits", "give --ckpt"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(compare, tmp_path, monkeypatch, argument, message):
    def fail(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(run, "_measure", fail)
    shape = {} if "resnet" in argument or "smal" in argument else SHAPE
    if message is None:  # a strategy without a knob has nothing to solve for
        argument, message = [argument, "--match_gmacs=1e-4"], "Strategy has no keep rate"
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        compare(*([argument] if isinstance(argument, str) else argument), shape=shape)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_such_device_here(compare):
    with pytest.raises(ValueError, match="no cuda device here"):
        compare("--device=cuda")


def test_a_folder_that_cannot_be_written(compare, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="cannot write to the folder"):
        compare()


def test_top1_of_the_methods_whose_weights_are_all_there(compare, tmp_path):
    vit = timm.create_model(NAME, **SHAPE).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    strategies = [
        {"class_path": "TopK", "init_args": {"keep_rate": 0.5, "layers": [1]}},
        {"class_path": "DyViT", "init_args": {"layers": [1]}},
        {"class_path": "EvoViT", "init_args": {"layers": [1]}},
    ]
    extra = ["--data.dataset=digits", "--data.num_workers=0", "--data.batch_size=500"]
    compare(f"--ckpt={tmp_path / 'vit.pth'}", *extra, strategies=strategies, rounds=1)
    rows = table(tmp_path)

    data = tdm.ImageNetDataModule("digits", model=NAME, model_kwargs=SHAPE, num_workers=0, batch_size=500)
    data.setup("test")
    for name, model in (("plain", vit), ("TopK", tdm.attach(vit, tdm.TopK(0.5, (1,))))):
        with torch.no_grad():
            right = [model(images).argmax(dim=1) == labels for images, labels in data.test_dataloader()]
        assert float(rows[name]["top1"]) == pytest.approx(torch.cat(right).float().mean().item())
    assert rows["DyViT"]["top1"] == rows["EvoViT"]["top1"] == ""
    text = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert "top-1 (%)" in text
    assert "no top-1 of DyViT" in text
    assert "no weights for strategy.score_predictor" in text
    assert "no top-1 of EvoViT" in text


def test_lower_precision(compare, tmp_path):
    compare("--dtype=bfloat16", rounds=1)
    full = int(table(tmp_path)["plain"]["parameters"]) * 4
    assert int(table(tmp_path)["plain"]["peak_bytes"]) < full


# The methods


@pytest.mark.parametrize(
    ("size", "evo", "dyvit"),
    [
        ("tiny", 817_754_112, 801_198_048),
        ("small", 3_033_391_104, 2_980_897_728),
        ("base", 11_658_313_728, 11_475_801_984),
    ],
)
def test_published_costs_of_evovit_and_dyvit(size, evo, dyvit):
    parameters = {"tiny": 5_899_582, "small": 22_774_414, "base": 89_452_846}[size]
    with torch.device("meta"):
        made = [methods.make_method(strategy, f"deit_{size}_patch16_224", {}) for strategy in (tdm.EvoViT(), tdm.DyViT())]
    assert [tdm.flops.count_macs(method.model) for method in made] == [evo, dyvit]
    assert sum(p.numel() for p in made[1].model.parameters()) == parameters


def test_the_posters_methods_at_their_published_settings():
    """GMACs of DeiT-T to three digits."""
    expected = {
        "TDM": 0.812,
        "EViT": 0.821,
        "EViT+TokenMerger": 0.812,
        "DyViT": 0.801,
        "DyViT+TokenMerger": 0.801,
        "EvoViT": 0.818,
        "ToMe": 0.731,
        "DPCKNN": 0.775,
        "TopK": 0.808,
        "PSViT": 0.694,
        "SPViT": 0.669,
        "SViTE": 0.868,
    }
    fixed = [strategy for strategy in methods.posters_strategies() if not strategy.adaptive]
    with torch.device("meta"):
        made = [methods.make_method(strategy, NAME, {}) for strategy in fixed]
    assert {method.name: round(tdm.flops.count_macs(method.model) / 1e9, 3) for method in made} == expected


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (tdm.TDM(), ("TDM", "keep_rate=0.7")),
        (tdm.TDM(merger=tdm.TokenMerger(matching="mutual")), None),
        (tdm.EViT(0.5, fuse=False), ("EViT", "keep_rate=0.5, fuse=False")),
        (tdm.DyViT(merger=tdm.TokenMerger()), ("DyViT+TokenMerger", "keep_rate=0.7")),
        (tdm.ToMe([11] * 9 + [10] * 3), ("ToMe", "r=[11×9, 10×3]")),
        (tdm.ToMe((8, -1.0)), ("ToMe", "r=[8, -1.0]")),
        (tdm.SViTE(interval=9), ("SViTE", "masks=Structured(heads=0.7, units=0.7), interval=9")),
        (tdm.Stack([tdm.SViTE(), tdm.ToMe(8)]), ("SViTE+ToMe", "masks=Structured(heads=0.7, units=0.7), r=8")),
    ],
)
def test_names_and_settings(strategy, expected):
    found = methods.describe(strategy)
    if expected is None:
        assert found[0] == "TDM"
        assert "TokenMerger(" in found[1]
        assert "matching='mutual'" in found[1]
    else:
        assert found == expected


def test_masked_heads_and_units_are_taken_out_before_measuring(compare, tmp_path, capsys):
    compare(strategies=[{"class_path": "SViTE"}])
    rows = table(tmp_path)
    vit = timm.create_model(NAME, **SHAPE)
    model = tdm.attach(vit, tdm.SViTE())
    tdm.sparsity.apply_masks(model)
    dense = tdm.sparsity.extract_dense(model)
    assert int(rows["SViTE"]["parameters"]) == sum(parameter.numel() for parameter in dense.parameters())
    assert int(rows["SViTE"]["macs"]) == tdm.flops.count_macs(dense)
    assert "SViTE: the model without its masked heads and units" in " ".join(capsys.readouterr().out.split())


def test_a_strategy_of_ones_own_that_needs_an_argument():
    class Mine(tdm.Strategy):
        def __init__(self, depth):
            super().__init__()
            self.depth = depth

    assert methods.describe(Mine(3)) == ("Mine", "depth=3")


# The measurements


def test_live_tensors_of_known_size():
    before = torch.zeros(1000)
    with memory.LiveTensors() as live:
        assert before.view(10, 100).t().shape == (100, 10)
        before.add_(1)
        assert live.peak == 0
        x = torch.ones(1000)
        part = x[:10]
        x += 1
        assert live.now == 4000
        y = x * 2
        assert live.now == live.peak == 8000
        del x
        assert live.now == 8000  # a view still holds it
        del part
        assert live.now == 4000
        z = y.double()
        assert live.now == live.peak == 12000
        del y
    assert live.now == 8000
    del z
    assert (live.now, live.peak) == (0, 12000)


def test_peak_of_a_known_model():
    model = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 10))
    weights = 10 * 1000 + 1000 + 1000 * 10 + 10
    assert memory.weight_bytes(model) == 4 * weights
    assert memory.peak_bytes(model, torch.zeros(4, 10)) == 4 * (weights + 4 * 1000 + 4 * 10)
    model[1].weight = nn.Parameter(model[0].weight.t())  # tied: one storage
    assert memory.weight_bytes(model) == 4 * (weights - 10 * 1000)


def test_rounds_are_interleaved_in_turning_order(monkeypatch):
    seen = []

    def seconds(model, images, passes=1):
        seen.append((model, len(images), passes))
        return 0.01 * model

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.03)
    steps = []
    rounds = list(timing.interleaved_rounds([1, 2, 3], torch.zeros(8, 1), 2, 1, lambda: steps.append(None)))
    assert [model for model, images, _ in seen if images == 8] == [1, 2, 3, 3, 2, 1, 1, 2, 3]
    assert {images for _, images, _ in seen} == {8, 1}
    assert {(model, passes) for model, _, passes in seen[:6]} == {(1, 1), (2, 1), (3, 1)}
    assert {(model, passes) for model, _, passes in seen[6:]} == {(1, 3), (2, 2), (3, 1)}
    assert len(steps) == 9
    assert [[sample.batch for sample in samples] for samples in rounds] == 2 * [[0.01, 0.02, 0.03]]


def test_ratios_are_taken_within_each_round():
    plain, other = (methods.Method(name, "", nn.Linear(2, 2)) for name in ("plain", "other"))
    found = run.Comparison(run.Plan(batch_size=8, device="cpu"), [plain, other], torch.zeros(8, 2), [100, 50], {})
    for base, ratio in ((1.0, 2.0), (10.0, 3.0), (4.0, 1.0)):
        found.rounds.append([timing.Sample(base, base / 4), timing.Sample(base / ratio, base / 8)])
    row = found.rows()[1]
    assert row.speedup == Spread(1.5, 2.0, 2.5)
    assert row.throughput.median == pytest.approx(8 / (10 / 3))  # of 16, 2.4 and 2
    assert row.latency_speedup == Spread(2.0, 2.0, 2.0)
    assert row.latency.median == pytest.approx(1e3 * 4 / 8)
    assert row.mac_ratio == 2
    assert row.efficiency == row.latency_efficiency == 1
    assert row.reduction == 0.5


def test_saved_for_backward_of_a_known_model():
    model = nn.Sequential(nn.Linear(10, 1000), nn.GELU(), nn.Linear(1000, 10))
    images = torch.zeros(4, 10)
    # The inputs of both linear layers and of the GELU; the weights are not counted.
    assert memory.saved_bytes(model, images) == 4 * (4 * 10 + 4 * 1000 + 4 * 1000)


def test_a_tensor_saved_twice_counts_once_and_none_is_kept_for_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(20))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) * layer(x).sigmoid()  # two layers save x
            return x

    images = torch.zeros(50, 10)
    with memory.LiveTensors() as live:
        saved = memory.saved_bytes(Model(), images)
    # The input of each pair of layers, and the two factors, one of which is also what the sigmoid saves.
    assert saved == 20 * 3 * 4 * 50 * 10
    assert live.peak < saved / 5


def test_reduced_tokens_save_less_for_backward():
    vit = timm.create_model("test_vit", img_size=96)
    images = torch.zeros(2, 3, 96, 96)
    reduced = tdm.attach(vit, tdm.TDM(keep_rate=0.5, layers=(1, 3)))
    assert memory.saved_bytes(reduced, images) < memory.saved_bytes(vit, images)


def test_own_time_is_a_share_of_the_pass_and_unknown_for_a_plain_model():
    vit = timm.create_model("test_vit", img_size=96).eval()
    images = torch.zeros(2, 3, 96, 96)
    assert math.isnan(timing.own_share(vit, images, 1))
    assert 0 < timing.own_share(tdm.attach(vit, tdm.TDM(keep_rate=0.5, layers=(1, 3))), images, 3) < 1


def test_training_steps_are_timed_where_asked_for(compare, tmp_path, capsys):
    compare("--training=true")
    assert "training step ms" in capsys.readouterr().out
    rows = table(tmp_path)
    assert float(rows["plain"]["training_step_ratio_to_plain"]) == 1
    assert all(float(row["training_step_ms"]) > 0 for row in rows.values())


def test_training_steps_are_left_out_by_default(compare, tmp_path, capsys):
    compare()
    assert "training step" not in capsys.readouterr().out
    assert table(tmp_path)["plain"]["training_step_ms"] == ""


def test_a_timed_training_step_leaves_the_model_as_it_was():
    model = reduced(tdm.TDM(0.5, (1,))).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert timing.step_seconds(model, torch.zeros(2, 3, 32, 32)) > 0
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Positive(tdm.Strategy):
    """Each image keeps its patches with a positive first channel."""

    adaptive = True

    def before_block(self, index, tokens):
        return tokens.packed(index, tokens.patches[..., 0] > 0) if index == 1 else tokens


def test_adaptive_methods_tell_their_spread(tmp_path):
    plan = run.Plan(batch_size=3, rounds=1, warmup=0)
    comparison = run.prepare(NAME, [Positive()], plan, SHAPE)
    assert "without trained weights" in comparison.remarks()[0]
    comparison.methods[1] = dataclasses.replace(comparison.methods[1], trained=True)
    costs = comparison.alone[1]
    assert comparison.rows()[1].macs_alone == pytest.approx(costs.macs.mean().item())
    assert comparison.rows()[1].macs_alone_std > 0
    assert comparison.macs[1] > costs.macs.mean()  # padding
    assert comparison.rows()[1].single_macs == round(costs.macs[0].item())
    assert "without trained weights" not in comparison.remarks()[0]
    assert "Positive, image by image:" in comparison.remarks()[0]


def test_real_images_are_timed_on(compare, tmp_path, monkeypatch):
    vit = timm.create_model(NAME, **SHAPE)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    seen = []
    monkeypatch.setattr(run, "peak_bytes", lambda model, images: seen.append(images) or 1)
    extra = ["--data.dataset=digits", "--data.num_workers=0", "--data.batch_size=500"]
    compare(f"--ckpt={tmp_path / 'vit.pth'}", *extra, rounds=1, strategies=STRATEGIES[:1])
    data = tdm.ImageNetDataModule("digits", model=NAME, model_kwargs=SHAPE, num_workers=0, batch_size=2)
    data.setup("test")
    torch.testing.assert_close(seen[0], next(iter(data.test_dataloader()))[0])


def test_the_whole_poster_is_compared_by_default():
    names = {type(strategy).__name__ for strategy in methods.posters_strategies()}
    assert names >= {"TDM", "EViT", "DyViT", "EvoViT", "PSViT", "SViTE", "SPViT", "IARED2", "AViT", "ToMe", "DPCKNN"}
    adjustable = {type(strategy).__name__ for strategy in methods.posters_strategies(adjustable=True)}
    assert adjustable == {"TDM", "EViT", "DyViT", "EvoViT", "PSViT", "ToMe", "DPCKNN", "TopK"}


# Other runtimes


@pytest.mark.parametrize("runtime", ["compile", "onnx"])
def test_other_runtimes_give_the_models_logits(runtime, monkeypatch):
    if runtime == "onnx":
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # the usual one takes its time
    model = reduced(tdm.EViT(0.5, layers=(1,)), {**SHAPE, "depth": 2}).eval()
    run_model = runtimes.runner(model, runtime)
    for images in torch.randn(3, 3, 32, 32), torch.randn(1, 3, 32, 32):
        with torch.inference_mode():
            found = torch.as_tensor(run_model(images))
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=1e-4)


def test_every_compiled_method_has_graphs_of_its_own(monkeypatch):
    """More models and batch sizes than graphs that one code object may have."""
    compiled = []
    count = functools.partial(torch.compile, backend=lambda graph, _: compiled.append(graph) or graph.forward)
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
    assert float(rows["TDM"]["batch1_ms"]) > 0
    assert rows["TDM"]["peak_bytes"] == rows["TDM"]["saved_bytes"] == rows["TDM"]["own_time"] == ""
    assert "torch.compile" in capsys.readouterr().out


def test_the_defaults_of_other_runtimes_keep_to_fixed_budgets():
    assert not any(strategy.adaptive for strategy in methods.posters_strategies(static=True))


@pytest.mark.parametrize("runtime", ["compile", "onnx"])
def test_other_runtimes_refuse_adaptive_methods(runtime):
    with pytest.raises(ValueError, match="Positive keeps another number of tokens for each image"):
        run.prepare(NAME, [Positive()], run.Plan(batch_size=2, runtime=runtime, device="cpu"), SHAPE)


def test_random_weights_are_the_same_whatever_stands_beside_a_method():
    plan = run.Plan(batch_size=2, device="cpu", seed=3)
    alone, beside = (run.prepare(NAME, [*others, tdm.DyViT(layers=(1,))], plan, SHAPE) for others in ([], [tdm.ToMe(2)]))
    assert torch.equal(alone.images, beside.images)
    for name, value in alone.methods[-1].model.state_dict().items():
        assert torch.equal(value, beside.methods[-1].model.state_dict()[name])
    plain = alone.methods[0].model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in alone.methods[-1].model.vit.state_dict().items())
