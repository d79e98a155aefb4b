"""How long commands show that they go on, and where their results lie."""

import io
import sys

import pytest
import timm
import torch
from PIL import Image

import tdm_lightning as tdm
from tdm_lightning.cli import main
from tdm_lightning.cli.progress import bars, say_where
from tdm_lightning.rates import learn_counts, most_steps
from tests.helpers.vits import lively


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_bars_tell_the_remaining_time_on_a_terminal(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with bars() as progress:
        assert list(progress.track([1, 2], description="halves")) == [1, 2]
    shown = screen.getvalue()
    assert "halves" in shown
    assert "100%" in shown
    assert "0:00:00" in shown


def test_no_bars_in_a_file(capsys):
    with bars() as progress:
        list(progress.track([1, 2], description="halves"))
    assert capsys.readouterr() == ("", "")


def test_results_are_a_path_a_line(tmp_path, capsys):
    say_where([tmp_path / "a.md", "b.csv"])
    assert capsys.readouterr().out == f"{tmp_path / 'a.md'}\nb.csv\n"


@pytest.mark.slow
@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_search_for_rates_takes_no_more_steps_than_it_says(sweeps):
    size = {"img_size": 16, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 3}
    vit = lively(timm.create_model("deit_tiny_patch16_224", **size, num_heads=2).eval())
    method = tdm.TokenReduction(None, None, tdm.WardMerger())
    budget = 0.6 * tdm.flops.macs_with(vit, tdm.Strategy()) / 1e9
    steps = []
    images = [torch.randn(4, 1, 16, 16)]
    found = learn_counts(vit, method, images, budget, (0, 1), sweeps, steps.append)
    assert len(steps) in [most_steps(2, done) for done in range(1, sweeps + 1)]
    assert steps[-1] == found
    losses = [step.loss for step in steps]
    assert losses == sorted(losses, reverse=True)


def test_a_command_on_a_terminal_shows_bars_and_prints_paths(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 40), (90, 20, 20)).save(tmp_path / "photo.png")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    size = '{"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 2}'
    given = ["--model=deit_tiny_patch16_224", f"--model_kwargs={size}", "--random_weights=true"]
    out = tmp_path / "out"
    main(["visualize", str(tmp_path / "photo.png"), *given, "--formats=gif", f"--out={out}"])
    assert "images" in screen.getvalue()
    assert capsys.readouterr().out == f"{out / 'photo_tokens.gif'}\n"
