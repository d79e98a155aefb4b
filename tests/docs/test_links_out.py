"""Links of pages to what lies outside docs/ lead there in the manual too."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def conf(monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_of_files_that_exist(conf):
    found = 0
    for page in ROOT.glob("docs/**/*.md"):
        for link in re.findall(rf"{conf.MARK}/([^)\s#]*)", conf.lead_out(page, page.read_text())):
            assert (ROOT / link).exists(), (page, link)
            found += 1
    assert found > 20


def test_only_links_out_of_the_pages_change(conf):
    page, mark = ROOT / "docs" / "guides" / "choose.md", conf.MARK
    kept = "[a](../results.md#b) ![c](../../benchmarks/d.png) [e](https://f) `../g`"
    assert conf.lead_out(page, kept) == kept
    assert conf.lead_out(page, "[a\nb](../../examples/c.py#d)") == (
        f"[a\nb]({mark}/examples/c.py#d)"
    )


def test_they_lead_to_the_repository_where_its_name_is_known(conf, monkeypatch):
    assert ROOT.resolve().as_uri() == conf.SOURCE
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/something")
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    conf.__spec__.loader.exec_module(conf)
    assert conf.SOURCE == "https://github.com/someone/something/blob/main"
