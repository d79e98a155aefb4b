"""What importing the library costs."""

import subprocess
import sys

import pytest


def imported_by(statement):
    code = (
        f"import sys; {statement}; print(' '.join(sorted(name for name in sys.modules if '.' not in"
        " name)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_numeric_core_brings_in_neither_lightning_nor_datasets():
    names = imported_by(
        "import tdm_lightning as tdm; tdm.TDM; tdm.checkpoints; tdm.flops; tdm.metrics;"
        " tdm.solve_keep_rate"
    )
    assert "tdm_lightning" in names
    assert not names & {"lightning", "pytorch_lightning", "datasets", "jsonargparse"}


def test_lightning_comes_with_the_names_that_need_it():
    assert "lightning" in imported_by("import tdm_lightning as tdm; tdm.TokenReductionClassifier")


def test_unknown_names():
    import tdm_lightning

    with pytest.raises(AttributeError, match="tdm_lightning.*has no attribute 'Nothing'"):
        tdm_lightning.Nothing  # noqa: B018


def test_every_public_name_exists():
    import tdm_lightning

    assert len(set(tdm_lightning.__all__)) == len(tdm_lightning.__all__)
    for name in tdm_lightning.__all__:
        assert getattr(tdm_lightning, name) is not None
