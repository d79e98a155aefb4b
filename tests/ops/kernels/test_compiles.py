"""Kernels compile for GPUs: the interpreter takes much that the compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
#: All that are launched.
KERNELS = {
    "_inner_products",
    "_match_alternating",
    "_decouple",
    "in_rounds",
    "agglomerate",
    "_combine",
    "_backward",
    "_class_importance",
    "_forward",
    "_to_queries",
    "_to_keys",
}


@pytest.mark.parametrize(("capability", "dtype", "n"), [(80, "bfloat16", 196), (90, "float32", 65)])
def test_every_kernel(capability, dtype, n, tmp_path):
    root = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "tests.helpers.compile_kernels",
        str(capability),
        dtype,
        str(n),
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert set(shared) == KERNELS
    assert max(map(int, shared.values())) < 100_000  # bytes: what every GPU since Ampere has
