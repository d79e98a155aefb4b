"""``python -m benchmarks.sweep``: what its checks see, how models are shrunk, and that it goes on
where it stopped.
"""

import csv

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

import tdm_lightning as tdm
from benchmarks.runner import run as run_command
from benchmarks.sweep import (
    MODULES,
    Sweep,
    chosen,
    examine,
    markdown,
    names,
    read_rows,
    run,
    sweep_names,
    try_name,
)
from benchmarks.sweep.__main__ import sweep as sweep_command
from benchmarks.sweep.shrink import shrinking
from benchmarks.sweep.table import Row, append_row, write_rows
from tdm_lightning.vit.adapters import eva

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}
TINY = [("vision_transformer", "test_vit"), ("vision_transformer", "test_vit2")]


def found(vit):
    generator = torch.Generator().manual_seed(0)
    examine.randomize(vit.eval(), generator)
    return examine.examine(vit, torch.randn(1, 3, 32, 32, generator=generator))


def rotary():
    torch.manual_seed(0)
    return Eva(**SMALL, use_rot_pos_emb=True)


def plain():
    torch.manual_seed(0)
    return VisionTransformer(**SMALL)


# The names


def test_all_modules_are_timms():
    pairs = chosen()
    assert {module for module, _ in pairs} == set(MODULES)
    assert len({name for _, name in pairs}) == len(pairs) > 250


def test_patterns_choose():
    assert chosen(["vision_transformer"], ["test_vit", "test_vit2"]) == TINY


@pytest.mark.parametrize(
    ("modules", "patterns"), [(["nothing"], None), (None, ["test_vit", "nothing*"])]
)
def test_what_matches_nothing_is_an_error(modules, patterns):
    with pytest.raises(ValueError, match="nothing"):
        chosen(modules, patterns)


# The checks


@pytest.mark.parametrize("make", [plain, rotary])
def test_a_reduced_model_passes(make):
    seen = found(make())
    assert seen.problems == []
    assert seen.tokens == [16, 16, 12, 9, 7]
    assert (seen.stray > examine.OTHER) == (make is rotary)  # NaN where no block asks for positions


def test_every_parameter_has_a_say():
    vit = VisionTransformer(
        **SMALL, init_values=1e-5, weight_init="jax_nlhb"
    )  # zeros in the head, tiny LayerScales
    images = torch.randn(1, 3, 32, 32)
    examine.randomize(vit.eval(), torch.Generator().manual_seed(0))
    before = vit(images)
    for name, parameter in vit.named_parameters():
        if name.endswith("qkv.bias"):
            continue  # a bias of the keys cancels in the softmax
        kept = parameter.data.clone()
        parameter.data.zero_()
        assert (vit(images) - before).abs().max() > 1e-3 * before.std(), name
        parameter.data.copy_(kept)


def test_positions_that_stay_behind_are_seen(monkeypatch):
    monkeypatch.setattr(
        eva, "rotation", lambda tokens, index: tokens.positions.rope[0][: tokens.count]
    )
    (problem,) = found(rotary()).problems
    assert problem.startswith("with its patches shuffled it is off by")


def test_positions_that_change_nothing_are_seen():
    vit = VisionTransformerRelPos(**SMALL, rel_pos_type="bias").eval()
    for block in vit.blocks:
        torch.nn.init.zeros_(block.attn.rel_pos.relative_position_bias_table)
    assert any(
        "proves nothing" in problem
        for problem in examine.examine(vit, torch.randn(1, 3, 32, 32)).problems
    )


def test_another_output_at_keep_rate_one_is_seen(monkeypatch):
    vit = plain()
    monkeypatch.setattr(
        vit, "forward", lambda images: VisionTransformer.forward(vit, images) + torch.arange(10.0)
    )
    assert any("at keep rate 1" in problem for problem in found(vit).problems)


def test_a_model_that_is_not_reduced_is_seen(monkeypatch):
    monkeypatch.setattr(examine, "reduction", lambda vit, keep_rate=1.0: tdm.TDM(1.0, (1,)))
    problems = found(plain()).problems
    assert any("tokens do not fall" in problem for problem in problems)
    assert any("reduced output differs by" in problem for problem in problems)


@pytest.mark.parametrize("factor", [torch.nan, 0.0])
def test_broken_gradients_are_seen(factor):
    vit = plain()
    vit.patch_embed.proj.weight.register_hook(lambda gradient: gradient * factor)
    (problem,) = found(vit).problems
    assert "gradients" in problem


def test_an_infinite_output_is_seen():
    vit = plain()
    vit.head.forward = lambda x: x.new_full((len(x), 10), torch.inf) * x.sum()
    assert any("output is not finite" in problem for problem in found(vit).problems)


# Shrinking


@pytest.mark.parametrize(
    "name",
    [
        "vit_giant_patch14_dinov2",
        "vit_giant_patch16_sapiens2",
        "vit_large_r50_s32_224",
        "naflexvit_so400m_patch16_siglip",
    ],
)
def test_shrunk_models_are_small_enough_and_of_the_same_make(name):
    whole = names.facts_of(names.outlined(name))
    with torch.device("meta"):
        facts = names.facts_of(timm.create_model(name, **shrinking(whole)))
    assert facts.parameters <= 1e8 < whole.parameters
    assert facts.depth == 6
    assert (facts.kind, facts.block, facts.attention) == (whole.kind, whole.block, whole.attention)
    assert facts.width / facts.heads == whole.width / whole.heads
    assert {facts.heads // keys for keys in facts.key_heads} == {
        whole.heads // keys for keys in whole.key_heads
    }


def test_a_width_that_a_convolutional_network_sets_stays():
    facts = names.facts_of(names.outlined("vit_base_mci_224"))
    assert shrinking(facts) == {"depth": 6}


# The sweep


@pytest.fixture
def table(tmp_path):
    return tmp_path / "families.csv"


@pytest.fixture
def tried(monkeypatch):
    """Names in the order they are tried, without trying them."""
    seen = []

    def record(module, name, sweep):
        seen.append(name)
        return Row(name, module, outcome="reduced", settings=sweep.settings)

    monkeypatch.setattr(run, "try_name", record)
    return seen


def test_a_sweep_goes_on_where_it_stopped(table, tried):
    assert sweep_names(TINY[:1], Sweep(), table)
    assert sweep_names(TINY, Sweep(), table)
    assert tried == ["test_vit", "test_vit2"]
    assert [row.name for row in read_rows(table)] == tried


def test_names_that_failed_are_tried_again(table, tried):
    write_rows(
        table, [Row("test_vit", "vision_transformer", outcome="failed", settings=Sweep().settings)]
    )
    sweep_names(TINY, Sweep(), table)
    assert tried == ["test_vit", "test_vit2"]
    assert [row.outcome for row in read_rows(table)] == ["reduced", "reduced"]


def test_a_line_that_was_cut_off_is_done_again(table, tried):
    sweep_names(TINY, Sweep(), table)
    table.write_text(table.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    sweep_names(TINY, Sweep(), table)
    assert tried == ["test_vit", "test_vit2", "test_vit2"]
    assert [row.name for row in read_rows(table)] == ["test_vit", "test_vit2"]


def test_an_interrupt_keeps_what_there_is(table, tried, monkeypatch):
    record = run.try_name

    def broken_off(module, name, sweep):
        if name == "test_vit2":
            raise KeyboardInterrupt
        return record(module, name, sweep)

    monkeypatch.setattr(run, "try_name", broken_off)
    assert not sweep_names(TINY, Sweep(), table)
    assert [row.name for row in read_rows(table)] == ["test_vit"]


def test_other_settings_want_another_folder(table, tried):
    sweep_names(TINY, Sweep(), table)
    with pytest.raises(ValueError, match="every model shrunk"):
        sweep_names(TINY, Sweep(max_params=0), table)
    assert len(read_rows(table)) == 2


def test_another_table_is_not_overwritten(table):
    table.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no table of this sweep"):
        sweep_names(TINY, Sweep(), table)
    assert table.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_rows_come_back_as_they_were(table):
    rows = [
        Row("a", "m", depth=3, identity_gap=0.5, reason='says "no", twice'),
        Row("b", "m", outcome="reduced", patches=9),
    ]
    write_rows(table, rows[:1])
    append_row(table, rows[1])
    assert repr(read_rows(table)) == repr(rows)  # NaN is not equal to itself


def test_a_model_of_another_kind_is_refused():
    row = try_name("resnet", "test_resnet", Sweep())
    assert row.outcome == "refused"
    assert "blocks" in row.reason
    assert row.parameters > 0


def test_an_error_in_a_model_is_a_finding(monkeypatch):
    monkeypatch.setattr(run, "examine", lambda vit, images: 1 / 0)
    row = try_name("vision_transformer", "test_vit", Sweep())
    assert (row.outcome, row.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert row.block == "Block"


def test_the_summary_counts():
    rows = [
        Row("a", "deit", kind="V", outcome="reduced"),
        Row("b", "deit", kind="V", outcome="reduced", shrunk="depth 6 of 24"),
        Row("c", "eva", kind="E", outcome="refused", reason="no blocks"),
        Row("d", "eva", kind="E", outcome="failed", reason="off"),
    ]
    text = markdown(rows)
    assert "| deit | 2 | 2 | 1 | 0 | 0 |" in text
    assert "| eva | 2 | 0 | 0 | 1 | 1 |" in text
    assert "| **all** | 4 | 2 | 1 | 1 | 1 |" in text
    assert (
        text.index("`c` (eva): no blocks") < text.index("## Failed") < text.index("`d` (eva): off")
    )


# The command


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    run_command(
        sweep_command, ['--names=["test_vit","test_vit_relpos"]', "--max_params=0", f"--out={out}"]
    )
    assert "2 of 2 names reduced" in capsys.readouterr().out
    with (out / "families.csv").open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["test_vit"]["outcome"] == rows["test_vit_relpos"]["outcome"] == "reduced"
    assert (rows["test_vit_relpos"]["shrunk"], rows["test_vit"]["shrunk"]) == ("depth 6 of 9", "")
    assert "| **all** | 2 | 2 | 1 | 0 | 0 |" in (out / "families.md").read_text(encoding="utf-8")


def test_the_command_after_an_interrupt(tmp_path, monkeypatch):
    def broken_off(module, name, sweep):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "try_name", broken_off)
    with pytest.raises(SystemExit) as ended:
        run_command(sweep_command, ['--names=["test_vit"]', f"--out={tmp_path}"])
    assert ended.value.code == 130
    assert (tmp_path / "families.md").exists()
