"""Two checkouts side by side."""

import pytest
import torch

from benchmarks.releases.__main__ import ROOT, Remote, releases
from tdm_lightning.errors import FileError, SettingError


def test_a_model_of_a_checkout_runs_in_a_process_of_its_own(tmp_path):
    remote = Remote(ROOT, "deit_tiny_patch16_224", "TDM")
    remote(torch.empty(2))
    assert remote.process.poll() is None
    remote.process.kill()


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(FileError, match="no checkout"):
        releases(str(tmp_path))
    with pytest.raises(SettingError, match="--old FOLDER"):
        releases()
