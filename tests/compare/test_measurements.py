"""``tdm compare``: how it measures time and memory; never how fast something is."""

import dataclasses
import math
import types

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.compare import launches, limit, memory, methods, run, timing
from tdm_lightning.compare.table import Quartiles
from tests.helpers.compares import NAME, SHAPE, STRATEGIES, Positive, reduced, table
from tests.helpers.compares import compare as compare  # a fixture


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
    rounds = list(
        timing.interleaved_rounds(
            [1, 2, 3], [torch.zeros(8, 1), torch.zeros(1, 1)], 2, 1, lambda: steps.append(None)
        )
    )
    assert [model for model, images, _ in seen if images == 8] == [1, 2, 3, 3, 2, 1, 1, 2, 3]
    assert {images for _, images, _ in seen} == {8, 1}
    assert {(model, passes) for model, _, passes in seen[:6]} == {(1, 1), (2, 1), (3, 1)}
    assert {(model, passes) for model, _, passes in seen[6:]} == {(1, 3), (2, 2), (3, 1)}
    assert len(steps) == 9
    assert [[sample.passes for sample in samples] for samples in rounds] == 2 * [
        [(0.01, 0.01), (0.02, 0.02), (0.03, 0.03)]
    ]
    assert rounds[0][0].steps == ()


def test_one_pass_against_another(monkeypatch):
    times = {"plain": [9.0, 2.0, 8.0, 9.0], "reduced": [9.0, 1.0, 2.0, 3.0]}
    monkeypatch.setattr(timing, "seconds", lambda model, *_: times[model].pop(0))
    assert timing.speedup("plain", "reduced", torch.zeros(1, 1), rounds=3) == 3  # of 2, 4 and 3
    assert times == {"plain": [], "reduced": []}


def test_ratios_are_taken_within_each_round():
    plain, other = (methods.Method(name, "", nn.Linear(2, 2)) for name in ("plain", "other"))
    macs = {(0, 8): 100, (1, 8): 55, (0, 1): 100, (1, 1): 55}
    all_of_it = {**macs, (1, 8): 50, (1, 1): 50}
    plan = run.Plan(batch_sizes=(8, 1), device="cpu")
    found = run.Comparison(plan, [plain, other], torch.zeros(8, 2), macs, {}, run_macs=all_of_it)
    for base, ratio in ((1.0, 2.0), (10.0, 3.0), (4.0, 1.0)):
        found.rounds.append(
            [timing.Sample((base, base / 4)), timing.Sample((base / ratio, base / 8))]
        )
    _, row, _, single = found.rows()
    assert row.speedup == Quartiles(1.5, 2.0, 2.5)
    assert row.throughput.median == pytest.approx(8 / (10 / 3))  # of 16, 2.4 and 2
    assert single.speedup == Quartiles(2.0, 2.0, 2.0)
    assert single.time.median == pytest.approx(1e3 * 4 / 8)
    assert row.mac_ratio == 2
    assert row.efficiency == single.efficiency == 1
    assert row.reduction == pytest.approx(0.45)


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
    # The input of each pair of layers, and the two factors, one of which is also what the sigmoid
    # saves.
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
    assert (
        0 < timing.own_share(tdm.attach(vit, tdm.TDM(keep_rate=0.5, layers=(1, 3))), images, 3) < 1
    )


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


def test_launches_are_counted_once_all_is_made():
    calls = []

    def run_model(images):
        calls.append(len(images))
        x = images + 1 if len(calls) == 1 else images
        return (x.view(-1) * 2).relu()

    images = torch.zeros(2, 3)
    assert launches.launches(run_model, images) == 2
    assert calls == [2, 2]
    assert launches.operations(lambda: images.t().mul(2).add_(1)) == ["mul", "add_"]
    assert "aten" in launches.counted(images.device)


def test_kernels_of_a_pass_are_those_of_the_device(monkeypatch):
    class Profile:
        def __init__(self, activities):
            self.found = []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            on, off = launches.DeviceType.CUDA, launches.DeviceType.CPU
            kinds = [(on, "gemm"), (off, "cudaLaunchKernel"), (on, "Memcpy DtoD")]
            return [types.SimpleNamespace(device_type=kind, name=name) for kind, name in kinds]

    monkeypatch.setattr(launches, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []
    assert launches.kernels(lambda: called.append(1)) == ["gemm", "Memcpy DtoD"]
    assert called == [1]


def test_times_on_cuda_are_of_its_events(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(timing, "wait_for", lambda device: order.append("idle"))
    assert timing.elapsed(lambda: order.append("work"), torch.device("cuda")) == 0.25
    assert order == ["idle", "record", "work", "record", "wait"]


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_free_slicing_counts_and_fates(pooling):
    vit = timm.create_model(NAME, **SHAPE, global_pool=pooling).eval()
    images = torch.randn(2, 3, 32, 32)
    model = tdm.attach(vit, limit.FreeSlicing([16, 9, 9, 4]))
    with torch.no_grad():
        logits, trace = model.trace(images)
        torch.testing.assert_close(model(images), logits)
    assert trace.token_counts == [16, 9, 9, 4]
    assert trace.layers[-1].assignment.tolist() == 2 * [[*range(4), *[-1] * 12]]
    with pytest.raises(ValueError, match="counts must hold one number per block, 4 here, got 2"):
        tdm.attach(vit, limit.FreeSlicing([16, 9]))


def test_free_slicing_of_rotary_positions():
    vit = Eva(**SHAPE, use_rot_pos_emb=True, use_abs_pos_emb=False).eval()
    model = tdm.attach(vit, limit.FreeSlicing([16, 8, 8, 8]))
    assert limit.token_counts(model, torch.randn(1, 3, 32, 32)) == [16, 8, 8, 8]
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_adaptive_methods_tell_their_spread(tmp_path):
    plan = run.Plan(batch_sizes=(3, 1), rounds=1, warmup=0, device="cpu")
    comparison = run.prepare(NAME, [Positive()], plan, SHAPE)
    assert "without trained weights" in comparison.remarks()[0]
    comparison.methods[1] = dataclasses.replace(comparison.methods[1], trained=True)
    costs = comparison.image_costs[1]
    assert comparison.rows()[1].macs_alone == pytest.approx(costs.macs.mean().item())
    assert comparison.rows()[1].macs_alone_std > 0
    assert comparison.macs[1, 3] > costs.macs.mean()  # padding
    assert comparison.macs[1, 1] == round(costs.macs[0].item())
    assert "without trained weights" not in comparison.remarks()[0]
    assert "Positive, image by image:" in comparison.remarks()[0]


def test_real_images_are_timed_on(compare, tmp_path, monkeypatch):
    vit = timm.create_model(NAME, **SHAPE)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    seen = []
    monkeypatch.setattr(run, "peak_bytes", lambda model, images: seen.append(images) or 1)
    extra = ["--data.dataset=digits", "--data.num_workers=0", "--data.batch_size=500"]
    compare(f"--weights={tmp_path / 'vit.pth'}", *extra, rounds=1, strategies=STRATEGIES[:1])
    data = tdm.ImageNetDataModule(
        "digits", model=NAME, model_kwargs=SHAPE, num_workers=0, batch_size=2
    )
    data.setup("test")
    torch.testing.assert_close(seen[0], next(iter(data.test_dataloader()))[0])
