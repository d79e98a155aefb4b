"""The commands of docs/start.md, one after the other, on a folder of small images."""

import glob
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdm_lightning.cli import main

START = Path(__file__).parents[2] / "docs" / "start.md"


def photographs(folder):
    """Two classes that differ in brightness, as JPEG files."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("validation", 2)):
        for name, level in (("cats", 60), ("dogs", 190)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.normal(level, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")


def commands():
    """Lines of the page's shell blocks, joined where they go on; the first block installs."""
    code = re.findall(r"```bash\n(.*?)```", START.read_text("utf-8"), flags=re.DOTALL)
    return "".join(code[1:]).replace("\\\n", " ").splitlines()


def test_from_a_folder_to_onnx_export(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TEST__DATA__NUM_WORKERS", "0")
    photographs(tmp_path / "photos")
    names, run = {}, []
    for line in commands():
        if found := re.fullmatch(r"(\w+)=\$\(ls (.*)\)", line):
            (names[f"${found[1]}"],) = glob.glob(found[2])
            continue
        program, *arguments = (names.get(word, word) for word in shlex.split(line))
        assert program == "tdm"
        if "vit_tiny_patch16_224" in arguments:  # a small model; else as it stands there
            arguments[arguments.index("vit_tiny_patch16_224")] = "test_vit"
            arguments += ["--model.model_kwargs", '{"img_size": 64, "depth": 12}']
        main(arguments)
        run.append(arguments[0])
    assert run == ["fit", "test", "test", "visualize", "compare", "export"]
    assert (tmp_path / "photos.onnx").stat().st_size > 0
    assert [*tmp_path.glob("panels/*.png")]
    assert (tmp_path / "compare" / "compare.md").exists()
