"""Packages that are compiled ahead of time and run without this library."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import tdm_lightning as tdm
from tdm_lightning import export
from tdm_lightning.cli import main
from tests.export.test_export import reduced

#: Runs a package where nothing but torch is imported.
ALONE = """
import sys
import torch
run = torch._inductor.aoti_load_package(sys.argv[1])
images = torch.load(sys.argv[2])
torch.save([run(images[:size]) for size in range(1, len(images) + 1)], sys.argv[3])
assert "tdm_lightning" not in sys.modules
assert "timm" not in sys.modules
"""

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


@needs_compiler
def test_a_package_runs_without_this_library(tmp_path):
    model = reduced(tdm.TDM(0.5, (0,)))
    written = export.export_compiled(model, tmp_path / "m.pt2")
    assert written.agreement.difference < 1e-4
    assert written.size == written.path.stat().st_size
    images = torch.randn(6, 3, 16, 16)
    files = [str(tmp_path / name) for name in ("m.pt2", "images.pt", "logits.pt")]
    torch.save(images, files[1])
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    found = torch.load(files[2])
    assert len(found) == 6
    for size, logits in enumerate(found, start=1):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images[:size]), atol=1e-4, rtol=1e-4)


def test_without_a_compiler_it_says_so(tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=r"found no compiler for it: install g\+\+"),
    ):
        export.export_compiled(reduced(tdm.Strategy()), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_package_has_torchs_ending(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.pt2 only, got '.*m\.so'"):
        export.export_compiled(reduced(tdm.Strategy()), tmp_path / "m.so")


@needs_compiler
def test_command_compiles(tmp_path, capsys):
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    arguments = ["--model=deit_tiny_patch16_224", f"--model_kwargs={settings}"]
    arguments += ["--strategy=TopK", "--strategy.layers=[0]", "--random_weights=true"]
    path = tmp_path / "m.pt2"
    assert main(["export", *arguments, "--format=aoti", f"--out={path}"]) == path
    assert "in AOTInductor logits differ by at most" in capsys.readouterr().out
