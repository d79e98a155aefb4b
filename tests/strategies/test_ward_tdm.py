"""WardTDM against records of a plain-loop reference, and the reference against its records."""

import numpy as np
import pytest
import torch

import tdm_lightning as tdm
from tests.helpers.peers import check_against_official
from tests.helpers.ward_reference import CASES, forward


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
def test_recorded_numbers(official, golden, case):
    method = golden(case)[0]["method"]
    check_against_official(official(case, tdm.WardTDM(**method)))


@pytest.mark.parametrize(
    "changed", [{"protect": 0.2}, {"rounds": 3}, {"layers": (1, 2)}, {"keep_rate": 0.65}], ids=str
)
@torch.no_grad()
def test_every_argument_matters_in_the_recorded_case(official, golden, changed):
    method = {**golden("ward_a")[0]["method"], **changed}
    _, tensors, model = official("ward_a", tdm.WardTDM(**method))
    assert (model(tensors["input"]) - tensors["logits"]).abs().max() > 1e-3


def test_the_reference_gives_its_record(golden):
    facts, tensors = golden("ward_c")
    weights = {k[11:]: v for k, v in tensors.items() if k.startswith("state_dict.")}
    shape, method = CASES["ward_c"]
    assert facts["method"] == method
    logits, groups = forward(weights, tensors["input"][0], shape, method)
    np.testing.assert_allclose(logits, tensors["logits"][0], atol=1e-5)
    for index, held in groups.items():
        assert held == tensors[f"source.{index}"][0].tolist()
