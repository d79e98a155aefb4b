"""``tdm compare``: the command and the methods; never how fast something is."""

import pytest
import timm
import torch
from PIL import Image

import tdm_lightning as tdm
from tdm_lightning.compare import methods, run, timing
from tdm_lightning.errors import SettingError
from tests.helpers.compares import NAME, SHAPE, STRATEGIES, lines, reduced, table
from tests.helpers.compares import compare as compare  # a fixture

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
        assert (
            float(row["images_per_second_q1"])
            <= float(row["images_per_second"])
            <= float(row["images_per_second_q3"])
        )
        assert float(row["batch_ms"]) > 0
        assert int(row["batch_size"]) == 2
        assert int(row["launches"]) > 0
        assert int(row["peak_bytes"]) > 4 * int(row["parameters"])
        assert row["top1"] == ""
        for version in (torch.__version__, timm.__version__, tdm.__version__):
            assert version in row["versions"]
        assert row["device"].startswith("cpu: ")
        assert row["CPU threads"] == "1"
        assert row["own_time"] == "" if name == "plain" else 0 < float(row["own_time"]) < 1
    assert float(rows["plain"]["ratio_to_plain"]) == 1

    text, printed = (
        (tmp_path / "out/compare.md").read_text(encoding="utf-8"),
        capsys.readouterr().out,
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    for word in (
        "random weights",
        "float32",
        "2 interleaved rounds",
        "dispatched aten operations",
        "patch embedding: as the model has it",
        "EvoViT",
        "keep_rate=0.5, layers=[1]",
    ):
        assert word in text
        assert word in printed
    assert "top-1" not in text
    with Image.open(tmp_path / "out/compare.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(2**20)) > len(rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.csv",
        "compare.md",
        "compare.png",
    ]


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


@pytest.mark.parametrize(
    ("rounds", "calls"), [(2, 3 * 8), (0, 9), (0, 3)], ids=["later", "first", "warm-up"]
)
def test_an_interrupt_keeps_complete_rounds(compare, tmp_path, monkeypatch, rounds, calls):
    """Four methods at two batch sizes take eight timings a round."""
    left = iter(range(calls))

    def seconds(model, images, passes=1):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return 0.5 if isinstance(model, tdm.TokenReducedViT) else 1.0

    monkeypatch.setattr(timing, "seconds", seconds)
    with pytest.raises(SystemExit) as stop:
        compare("--batch_sizes=[2,1]", rounds=5)
    assert stop.value.code == 130
    assert f"interrupted after {rounds} of 5 rounds" in (tmp_path / "out/compare.md").read_text(
        encoding="utf-8"
    )
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
        ("--batch_sizes=0", "batch_sizes must be at least 1"),
        ("--batch_sizes=[2,2]", "batch_sizes must be different numbers"),
        ("--precision=float8", "precision must be one of 'float32'"),
        ("--device=abacus", "device must be"),
        ("--device=cpu:0:1", "device must be"),
        ("--match_gmacs=0", "must be a positive number"),
        ("--match_gmacs=0.00001", "cannot meet"),
        (
            '--strategies=[{"class_path":"TDM"}]',
            r"TDM\(keep_rate=0.7\) does not fit deit_tiny.* layers \[6, 9\] do not exist",
        ),
        ('--strategies=[{"class_path":"Strategy"}]', None),
        ("--runtime=tensorrt", "runtime must be one of 'eager'"),
        (["--runtime=onnx", "--precision=bfloat16"], "runtime=onnx runs on the CPU in float32"),
        (["--runtime=compile", "--training=true"], "training steps are timed with runtime=eager"),
        ("--runtime=graph", "runtime=graph captures CUDA graphs, and the device is cpu"),
        (["--limit=true", '--strategies=[{"class_path":"AViT"}]'], "there is none; add one"),
        ("--weights=missing.pth", "missing.pth"),
        ("--data.dataset=digits", "give --weights"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(
    compare, tmp_path, monkeypatch, argument, message
):
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
    compare(f"--weights={tmp_path / 'vit.pth'}", *extra, strategies=strategies, rounds=1)
    rows = table(tmp_path)

    data = tdm.ImageNetDataModule(
        "digits", model=NAME, model_kwargs=SHAPE, num_workers=0, batch_size=500
    )
    data.setup("test")
    for name, model in (("plain", vit), ("TopK", tdm.attach(vit, tdm.TopK(0.5, (1,))))):
        with torch.no_grad():
            right = [
                model(images).argmax(dim=1) == labels for images, labels in data.test_dataloader()
            ]
        assert float(rows[name]["top1"]) == pytest.approx(torch.cat(right).float().mean().item())
    assert rows["DyViT"]["top1"] == rows["EvoViT"]["top1"] == ""
    text = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert "top-1 (%)" in text
    assert "no top-1 of DyViT" in text
    assert "no weights for strategy.score_predictor" in text
    assert "no top-1 of EvoViT" in text
    with Image.open(tmp_path / "out/accuracy.png") as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_lower_precision(compare, tmp_path, name):
    compare(f"--precision={name}", rounds=1, strategies=STRATEGIES[:1])
    assert ", bfloat16, " in table(tmp_path)["plain"]["measured"]
    full = int(table(tmp_path)["plain"]["parameters"]) * 4
    assert int(table(tmp_path)["plain"]["peak_bytes"]) < full


def test_a_row_for_each_method_and_batch_size(compare, tmp_path):
    compare("--batch_sizes", "3", "1", strategies=STRATEGIES[:1], rounds=1)
    rows = lines(tmp_path)
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        ("plain", "3"),
        ("TDM", "3"),
        ("plain", "1"),
        ("TDM", "1"),
    ]
    assert int(rows[0]["peak_bytes"]) > int(rows[2]["peak_bytes"])
    assert int(rows[1]["saved_bytes"]) > 2 * int(rows[3]["saved_bytes"])
    for row in rows:
        speed = float(row["images_per_second"]) * float(row["batch_ms"]) / 1e3
        assert speed == pytest.approx(int(row["batch_size"]))


def test_free_slicing_is_the_limit(compare, tmp_path):
    strategies = [{"class_path": "EvoViT", "init_args": {"layers": [2]}}, STRATEGIES[0]]
    compare("--limit=true", strategies=strategies, rounds=1)
    rows = table(tmp_path)
    assert list(rows) == ["plain", "free slicing", "EvoViT", "TDM"]
    assert rows["free slicing"]["settings"] == "as many tokens as TDM(keep_rate=0.5, layers=[1])"
    assert rows["free slicing"]["macs"] == rows["TDM"]["macs"]
    # A slice is a view, so nothing is dispatched that the plain model does not; but a last block of
    # which only the class token is read brings those rows together and forms their queries apart.
    assert 0 <= int(rows["free slicing"]["launches"]) - int(rows["plain"]["launches"]) <= 2
    assert int(rows["TDM"]["launches"]) > int(rows["plain"]["launches"])
    assert float(rows["free slicing"]["ratio_to_free_slicing"]) == 1
    text = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert "× free slicing" in text


def test_linear_embedding_is_in_all_models_and_named(compare, tmp_path):
    compare("--linear_embedding=true", "--limit=true", strategies=STRATEGIES[:1], rounds=1)
    row = table(tmp_path)["plain"]
    assert row["patch embedding"] == "as reshape and linear, in all models, the plain one too"
    plan = run.Plan(2, device="cpu", limit=True, linear_embedding=True)
    compared = run.prepare(NAME, [tdm.TDM(0.5, (1,)), tdm.ToMe(2)], plan, SHAPE)
    assert len(compared.methods) == 4
    for method in compared.methods:
        assert not any(type(inner) is torch.nn.Conv2d for inner in method.model.modules())
    usual = run.prepare(NAME, [tdm.TDM(0.5, (1,)), tdm.ToMe(2)], run.Plan(2, device="cpu"), SHAPE)
    assert compared.macs[0, 2] == usual.macs[0, 2]


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
        made = [
            methods.make_method(strategy, f"deit_{size}_patch16_224", {})
            for strategy in (tdm.EvoViT(), tdm.DyViT())
        ]
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
    assert {
        method.name: round(tdm.flops.count_macs(method.model) / 1e9, 3) for method in made
    } == expected


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (tdm.TDM(), ("TDM", "keep_rate=0.7")),
        (tdm.TDM(merger=tdm.TokenMerger(matching="greedy")), None),
        (tdm.EViT(0.5, fuse=False), ("EViT", "keep_rate=0.5, fuse=False")),
        (tdm.DyViT(merger=tdm.TokenMerger()), ("DyViT+TokenMerger", "keep_rate=0.7")),
        (tdm.ToMe([11] * 9 + [10] * 3), ("ToMe", "r=[11×9, 10×3]")),
        (tdm.ToMe((8, -1.0)), ("ToMe", "r=[8, -1.0]")),
        (tdm.SViTE(interval=9), ("SViTE", "masks=Structured(heads=0.7, units=0.7), interval=9")),
        (
            tdm.Stack([tdm.SViTE(), tdm.ToMe(8)]),
            ("SViTE+ToMe", "masks=Structured(heads=0.7, units=0.7), r=8"),
        ),
    ],
)
def test_names_and_settings(strategy, expected):
    found = methods.describe(strategy)
    if expected is None:
        assert found[0] == "TDM"
        assert "TokenMerger(" in found[1]
        assert "matching='greedy'" in found[1]
    else:
        assert found == expected


def test_masked_heads_and_units_are_taken_out_before_measuring(compare, tmp_path, capsys):
    compare(strategies=[{"class_path": "SViTE"}])
    rows = table(tmp_path)
    vit = timm.create_model(NAME, **SHAPE)
    model = tdm.attach(vit, tdm.SViTE())
    tdm.sparsity.apply_masks(model)
    dense = tdm.sparsity.extract_dense(model)
    assert int(rows["SViTE"]["parameters"]) == sum(
        parameter.numel() for parameter in dense.parameters()
    )
    assert int(rows["SViTE"]["macs"]) == tdm.flops.count_macs(dense)
    assert "SViTE: the model without its masked heads and units" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_strategy_of_ones_own_that_needs_an_argument():
    class Mine(tdm.Strategy):
        def __init__(self, depth):
            super().__init__()
            self.depth = depth

    assert methods.describe(Mine(3)) == ("Mine", "depth=3")


def test_the_usual_layers_go_by_the_depth_where_it_has_not_all_of_them():
    layers = {
        depth: {
            methods.describe(strategy)[0]: tuple(strategy.layers)
            for strategy in methods.posters_strategies(depth=depth)
            if hasattr(strategy, "layers")
        }
        for depth in (4, 6, 12, 24)
    }
    assert [layers[depth]["TDM"] for depth in layers] == [
        (1, 2, 3),
        (1, 3, 4),
        (3, 6, 9),
        (3, 6, 9),
    ]
    assert layers[6]["EvoViT"] == (2, 4)
    assert layers[12] == layers[24]


def test_an_encoder_without_a_classifier_has_no_accuracy():
    pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    plan = run.Plan(1, rounds=1, warmup=0)
    with pytest.raises(SettingError, match="gives features and no logits"):
        run.prepare("hf:dinov2", [tdm.TDM(0.5, (1,))], plan, shape, data=object())


def test_by_default_what_the_model_takes_is_compared():
    plan = run.Plan(1, rounds=1, warmup=0)
    shallow = run.prepare("test_vit", None, plan)
    assert [method.name for method in shallow.methods][:3] == ["plain", "TDM", "EViT"]
    assert shallow.facts["usual layers"] == "as far into these 6 blocks"
    assert "left out" not in shallow.facts
    relative = run.prepare("test_vit_relpos", None, plan, {"depth": 12})
    assert "EvoViT" in relative.facts["left out"]
    assert "usual layers" not in relative.facts
    assert "EvoViT" not in [method.name for method in relative.methods]
    with pytest.raises(TypeError, match="EvoViT"):
        run.prepare("test_vit_relpos", [tdm.EvoViT()], plan, {"depth": 12})


def test_the_whole_poster_is_compared_by_default():
    names = {type(strategy).__name__ for strategy in methods.posters_strategies()}
    assert names >= {
        "TDM",
        "EViT",
        "DyViT",
        "EvoViT",
        "PSViT",
        "SViTE",
        "SPViT",
        "IARED2",
        "AViT",
        "ToMe",
        "DPCKNN",
    }
    adjustable = {
        type(strategy).__name__ for strategy in methods.posters_strategies(adjustable=True)
    }
    assert adjustable == {
        "TDM",
        "EViT",
        "DyViT",
        "EvoViT",
        "PSViT",
        "SPViT",
        "SViTE",
        "ToMe",
        "DPCKNN",
        "TopK",
    }


def test_random_weights_are_the_same_whatever_stands_beside_a_method():
    plan = run.Plan(batch_sizes=2, device="cpu", seed=3)
    alone, beside = (
        run.prepare(NAME, [*others, tdm.DyViT(layers=(1,))], plan, SHAPE)
        for others in ([], [tdm.ToMe(2)])
    )
    assert torch.equal(alone.images, beside.images)
    for name, value in alone.methods[-1].model.state_dict().items():
        assert torch.equal(value, beside.methods[-1].model.state_dict()[name])
    plain = alone.methods[0].model.state_dict()
    assert all(
        torch.equal(value, plain[name])
        for name, value in alone.methods[-1].model.vit.state_dict().items()
    )
