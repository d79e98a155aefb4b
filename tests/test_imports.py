"""What importing the library costs, and what its rooms may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tdm_lightning"


#: What takes long to import and few need.
HEAVY = {
    "datasets",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "onnx",
    "pandas",
    "pytorch_lightning",
    "torchao",
    "torchmetrics",
    "transformers",
}


def imported(code):
    """The modules that a program has imported, at each ``show()``."""
    code = f"import sys; show = lambda: print('>', *sys.modules)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines() if line.startswith(">")]


def test_the_numeric_core_needs_neither_lightning_nor_datasets():
    package, core = imported(
        "import tdm_lightning as tdm; show()\n"
        "from tdm_lightning.strategies import Strategy\n"
        "Strategy.from_config({'class_path': 'SViTE'})  # a class of a room that is not open yet\n"
        "tdm.TDM, tdm.SViTE, tdm.attach, tdm.accelerate, tdm.kernels, tdm.checkpoints, tdm.flops\n"
        "tdm.solve_keep_rate, tdm.hub, tdm.export; show()"
    )
    assert not package & {*HEAVY, "numpy", "timm", "torch"}
    assert {"tdm_lightning.vit", "torch"} <= core
    assert not core & HEAVY


AT_ONCE = [
    "",
    "--help",
    "frobnicate",
    "fit --model.lrr=3",
    "fit --model.lr=fast",
    "fit --config quickstrat",
    "export --modle=a",
]


@pytest.mark.parametrize("arguments", AT_ONCE, ids=range(len(AT_ONCE)))
def test_usage_errors_wait_for_nothing(arguments):
    (modules,) = imported(
        f"sys.argv = ['tdm', *{arguments.split()}]\n"
        "from tdm_lightning.cli import entry\n"
        "try:\n    entry()\nexcept SystemExit:\n    pass\nshow()"
    )
    assert "tdm_lightning.cli.app" in modules
    assert not modules & {*HEAVY, "numpy", "timm", "torch"}


def test_names_come_however_they_are_asked_for():
    import tdm_lightning

    namespace = {}
    exec("from tdm_lightning import *", namespace)
    assert namespace.keys() >= set(tdm_lightning.__all__)
    assert set(dir(tdm_lightning)) >= {*tdm_lightning.__all__, "mergers", "strategies", "vit"}
    assert tdm_lightning.mergers.Drop is tdm_lightning.Drop


def test_unknown_names():
    import tdm_lightning

    with pytest.raises(AttributeError, match="tdm_lightning.*has no attribute 'Nothing'"):
        tdm_lightning.Nothing  # noqa: B018


def test_every_public_name_exists():
    import tdm_lightning

    assert len(set(tdm_lightning.__all__)) == len(tdm_lightning.__all__)
    for name in tdm_lightning.__all__:
        assert getattr(tdm_lightning, name) is not None


# Walls between the rooms: what `lint-imports` does not see ------------------------------------


def imports(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_are_seen_however_they_are_written(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "import a.b as c\nfrom d import e\ndef f():\n    from tdm_lightning.callbacks import g\n"
    )
    assert list(imports(path)) == ["a.b", "d.e", "tdm_lightning.callbacks.g"]


def test_only_the_command_line_imports_the_callbacks():
    """They lie elsewhere in the checkout, where import-linter does not find them by this name."""
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        for name in imports(path)
        if name.startswith(("tdm_lightning.callbacks", "callbacks"))
    }
    assert users == {"cli"}


def test_no_room_imports_the_package_itself():
    """``import tdm_lightning as tdm`` would bring all floors into each."""
    inside = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.iterdir()}
    rooms = {f"tdm_lightning.{name.removesuffix('.py')}" for name in inside}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for name in imports(path):
            if name.partition(".")[0] == "tdm_lightning":
                room = ".".join(name.split(".")[:2])
                assert room in rooms | {"tdm_lightning.callbacks"}, f"{path} imports {name}"


def test_few_modules_lie_loose_at_the_top():
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= 8, sorted(loose)
