"""Wheel and sdist hold everything; the callbacks and configurations are found wherever the package
lies.
"""

import ast
import email
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import packages_distributions
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
    "tdm_lightning/visualize/page.html",
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
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tdm_lightning"}
    rooms = {name.split("/")[1] for name in names if name.startswith("tdm_lightning/")}
    assert not rooms & {"benchmarks", "tests", "examples", "docs"}


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
    assert not {name.partition("/")[0] for name in names} & {"benchmarks", "tests", "docs"}


def test_what_is_imported_is_asked_for(built):
    """What the library imports is a dependency or of an extra, and each dependency is imported."""
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
        sources = [archive.read(name) for name in archive.namelist() if name.endswith(".py")]
    kinds = {re.match(r"[\w-]+", line)[0].lower(): "extra ==" in line for line in asked}
    assert "torch" in kinds
    imported = {
        module.partition(".")[0]
        for source in sources
        for node in ast.walk(ast.parse(source))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    } - sys.stdlib_module_names
    distributions = packages_distributions()
    used = {distributions[module][0].lower() for module in imported - {"tdm_lightning"}}
    assert used <= kinds.keys()
    assert {name for name, extra in kinds.items() if not extra} <= used


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """The programs of an environment that holds the wheel, and of the checkout nothing."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    install = ("install", "--quiet", "--no-deps", str(built[1]))
    run(sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), *install)
    # What the library depends on is borrowed. Folders named in here are searched, but their own
    # `.pth` files are not read, so an editable install of the checkout stays unseen.
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin"


def test_installed_wheel_works_outside_the_checkout(bare, tmp_path):
    code = (
        "import tdm_lightning, tdm_lightning.callbacks as callbacks; from tdm_lightning.cli import"
        " config_folder, named_configs; print(tdm_lightning.__file__, callbacks.__file__,"
        " callbacks.KeepRateWarmup.__name__, config_folder(), named_configs())"
    )
    printed = run(bare / "python", "-c", code, cwd=tmp_path)
    assert printed.count(str(bare.parent)) == 3
    assert "strategies/tdm" in printed


def test_installed_commands_run_outside_the_checkout(bare, tmp_path):
    assert run(bare / "tdm", "--version", cwd=tmp_path).startswith("tdm-lightning ")
    module = (bare / "python", "-m", "tdm_lightning")
    printed = run(*module, "fit", "--config", "quickstart", "--print_config", cwd=tmp_path)
    assert "class_path: tdm_lightning." in printed


def test_an_editable_install_finds_callbacks_and_configurations(tmp_path):
    code = (
        "import tdm_lightning.callbacks as callbacks; from tdm_lightning.cli import config_folder;"
        " print(callbacks.__file__); print(config_folder())"
    )
    callbacks, configs = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert Path(callbacks).resolve() == ROOT / "callbacks" / "__init__.py"
    assert Path(configs).resolve() == ROOT / "configs"


def test_checkout_finds_callbacks_and_configurations():
    code = (
        "import tdm_lightning.callbacks; from tdm_lightning.cli import config_folder;"
        " print(config_folder())"
    )
    assert Path(run(sys.executable, "-c", code, cwd=ROOT).strip()).resolve() == ROOT / "configs"
