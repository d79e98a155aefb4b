"""Wheel and sdist hold everything; the callbacks and configurations are found wherever the package
lies.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "tdm_lightning/__init__.py",
    "tdm_lightning/py.typed",
    "tdm_lightning/ops/__init__.py",
    "tdm_lightning/callbacks/__init__.py",
    "tdm_lightning/configs/quickstart.yaml",
    "tdm_lightning/configs/strategies/tdm.yaml",
}


def run(*command, cwd=None, env=None):
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel made from an sdist, as a release is."""
    folder = tmp_path_factory.mktemp("dist")
    # From a copy of what git knows, so that a build folder in the checkout cannot lend files that
    # the metadata forgot.
    source = tmp_path_factory.mktemp("source")
    files = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source))
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_every_package(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    assert names >= EXPECTED
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tdm_lightning").rglob("*.py")}
    sources |= {
        f"tdm_lightning/{path.relative_to(ROOT).as_posix()}"
        for folder in ("callbacks", "configs")
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert names >= sources
    assert not any(name.startswith(("tests/", "callbacks/", "configs/")) for name in names)


def test_sdist_holds_what_the_wheel_is_made_of(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "callbacks/__init__.py",
        "configs/quickstart.yaml",
    } <= names


def test_installed_wheel_works_from_another_folder(built, tmp_path):
    target = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(built[1]),
    )
    code = (
        "import tdm_lightning, tdm_lightning.callbacks as callbacks;from tdm_lightning.cli import"
        " config_folder, named_configs;print(tdm_lightning.__file__,"
        " callbacks.KeepRateWarmup.__name__, config_folder(), named_configs())"
    )
    printed = run(
        sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}
    )
    assert printed.count(str(target)) == 2
    assert "strategies/tdm" in printed


def test_checkout_finds_callbacks_and_configurations():
    code = (
        "import tdm_lightning.callbacks; from tdm_lightning.cli import config_folder;"
        " print(config_folder())"
    )
    assert Path(run(sys.executable, "-c", code, cwd=ROOT).strip()).resolve() == ROOT / "configs"
