"""Other people's strategies, found by entry points."""

import sys

import pytest

import tdm_lightning as tdm
from tdm_lightning.core import plugins

MODULE = """
import tdm_lightning as tdm

class FromAPlugin(tdm.TDM):
    pass
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution that offers two modules, one of which cannot be imported."""
    (tmp_path / "a_plugin.py").write_text(MODULE)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such card')")
    info = tmp_path / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    points = "broken = broken_plugin\ngood = a_plugin\n"
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load_plugins.cache_clear()
    yield
    plugins.load_plugins.cache_clear()
    for name in ("a_plugin", "broken_plugin"):
        sys.modules.pop(name, None)


def test_plugins_are_imported_and_broken_ones_named(installed):
    with pytest.warns(UserWarning, match=r"'broken' \(broken_plugin\).*RuntimeError: no such card"):
        loaded = plugins.load_plugins()
    assert loaded == ("good",)
    built = tdm.Strategy.from_config({"class_path": "a_plugin.FromAPlugin"})
    assert type(built).__name__ == "FromAPlugin"
    assert built.config()["class_path"] == "a_plugin.FromAPlugin"


@pytest.mark.filterwarnings("ignore:the plugin 'broken'")
def test_the_command_line_knows_them(installed, tmp_path, monkeypatch):
    from tdm_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config=quickstart", "--model.strategy=FromAPlugin"]
    arguments += ["--trainer.fast_dev_run=1", "--model.warmup_epochs=0", "--trainer.callbacks=null"]
    cli = main([*arguments, "--trainer.logger=false", "--trainer.enable_progress_bar=false"])
    assert type(cli.model.model.strategy).__name__ == "FromAPlugin"
