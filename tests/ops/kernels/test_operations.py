"""Kernels in the interpreter against torch's form: values and gradients; the plans have files of
their own.
"""

import warnings

import pytest
import torch

from tdm_lightning import kernels
from tdm_lightning.ops import combine, decouple, ward_plan
from tdm_lightning.ops.alternating import alternating_groups
from tdm_lightning.ops.attention import attention_by_rows, biased_attention
from tdm_lightning.ops.importance import class_importance
from tdm_lightning.ops.kernels import dispatch

pytest.importorskip("triton")
HALVES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [1, 2, 7, 17, 65, 196, 257]


@pytest.fixture(autouse=True)
def _kernels():
    with kernels.use("triton"), warnings.catch_warnings():
        # a kernel that fails or is refused
        warnings.filterwarnings("error", ".*torch's form.*", RuntimeWarning)
        dispatch._warned.cache_clear()
        yield


def packed(n, width=32, heads=2, batch=2, dtype=torch.float32):
    """Queries, keys and values as views into one projection, B×H×N×d each."""
    qkv = torch.randn(batch, n, 3, heads, width, dtype=torch.float64)
    return qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def behind_prefix(n, width, batch=2, dtype=torch.float32):
    return torch.randn(batch, n + 1, width).to(dtype)[:, 1:]


def close(dtype):
    wide = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    return {"atol": wide, "rtol": wide}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", COUNTS)
def test_combine(n, dtype):
    x, groups = behind_prefix(n, 40, dtype=dtype), max(n // 2, 1)
    group = torch.randint(-1, groups, (2, n))
    weight, size = torch.rand(2, n), torch.randint(1, 5, (2, n)).float()
    weight[:, ::3] = 0
    for mine, theirs in zip(
        combine(x, group, weight, size, groups),
        combine.form(x, group, weight, size, groups),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **close(dtype))


def test_combine_flows_back():
    x = behind_prefix(30, 24).clone().requires_grad_()
    weight = torch.rand(2, 30, requires_grad=True)
    group, size, flow = torch.randint(-1, 9, (2, 30)), torch.ones(2, 30), torch.randn(2, 9, 24)
    found = []
    for function in (combine, combine.form):
        out, _ = function(x, group, weight, size, 9)
        found.append(torch.autograd.grad((out * flow).sum(), (x, weight)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", COUNTS)
def test_class_importance(n, dtype):
    q, k, _ = packed(n, dtype=dtype)
    for rows, bias in ((1, None), (min(n, 2), torch.randn(2, 1, 1, n))):
        found = class_importance(q, k, 0.2, rows, bias)
        expected = class_importance.form(q, k, 0.2, rows, bias)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_class_importance_flows_back():
    q, k, _ = (x.clone().requires_grad_() for x in packed(20))
    flow, bias = torch.randn(2, 20), torch.randn(2, 1, 1, 20)
    found = [
        torch.autograd.grad((function(q, k, 0.2, 1, bias) * flow).sum(), (q, k))
        for function in (class_importance, class_importance.form)
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [32, 64, 80, 128])
def test_attention_of_head_widths(width, dtype):
    q, k, v = packed(33, width, dtype=dtype)
    bias = torch.randn(2, 1, 1, 33)
    bias[:, ..., 5] = -1e4  # hidden
    found, expected = (
        function(q, k, v, bias, width**-0.5)
        for function in (attention_by_rows, attention_by_rows.form)
    )
    torch.testing.assert_close(found, expected, **close(dtype))


@pytest.mark.parametrize("n", COUNTS)
def test_attention_of_lengths(n):
    q, k, v = packed(n)
    bias = torch.randn(2, 1, 1, n)
    expected = attention_by_rows.form(q, k, v, bias, 0.2).transpose(1, 2)
    torch.testing.assert_close(biased_attention(q, k, v, bias, 0.2), expected, atol=1e-5, rtol=1e-4)
    hidden = torch.full_like(bias, -1e4)
    assert biased_attention(q, k, v, hidden, 0.2).isfinite().all()


def test_attention_flows_back():
    q, k, v = (x.clone().requires_grad_() for x in packed(37))
    bias, flow = torch.randn(2, 1, 1, 37), torch.randn(2, 37, 2, 32)
    found = [
        torch.autograd.grad((function(q, k, v, bias, 0.2) * flow).sum(), (q, k, v))
        for function in (attention_by_rows, attention_by_rows.form)
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("width", [20, 136])
def test_odd_head_widths_are_named(width):
    q, k, v = packed(9, width)
    bias = torch.randn(2, 1, 1, 9)
    with pytest.warns(RuntimeWarning, match=f"multiple of 8 and at most 128, got {width}"):
        found = biased_attention(q, k, v, bias, 0.2)
    torch.testing.assert_close(found.transpose(1, 2), attention_by_rows.form(q, k, v, bias, 0.2))


PLANS = {
    "alternating": (alternating_groups, lambda x, n: (x, n // 3, 1)),
    "decouple": (
        decouple,
        lambda x, n: (
            x,
            torch.rand(2, n),
            max(n // 2, 1),
            n // 6,
            max((n - n // 2) // 4, int(n > 1)),
        ),
    ),
    "ward": (
        ward_plan,
        lambda x, n: (x, x[..., :8] * 2, torch.rand(2, n) + 0.5, n - n // 3, 4, None),
    ),
    "ward, exact": (
        ward_plan,
        lambda x, n: (x, None, torch.rand(2, n) + 0.5, n - min(n // 3, 9), None, None),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_more_tokens_than_a_plan_takes_are_named(name, monkeypatch):
    monkeypatch.setattr("tdm_lightning.ops.kernels.limits.MOST", 20)
    operation, arguments = PLANS[name]
    given = arguments(behind_prefix(21, 24), 21)
    with pytest.warns(RuntimeWarning, match="at most 20 tokens, got 21"):
        assert torch.equal(operation(*given), operation.form(*given))


def test_they_are_operators():
    q, k, v = packed(9)
    x, group = torch.randn(2, 9, 16), torch.randint(0, 4, (2, 9))
    weight, bias = torch.rand(2, 9), torch.randn(2, 1, 1, 9)
    calls = [
        (combine, (x.requires_grad_(), group, weight, torch.ones(2, 9), 4)),
        (class_importance, (q.clone().requires_grad_(), k, 0.2, 1, bias)),
        (attention_by_rows, (q.clone().requires_grad_(), k, v, bias, 0.2)),
    ]
    for operation, arguments in calls:
        torch.library.opcheck(operation.op, arguments)
