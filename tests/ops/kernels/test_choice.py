"""Which form runs, and what is said where a kernel cannot."""

import sys
import types

import pytest
import torch
from torch import Tensor

from tdm_lightning import kernels
from tdm_lightning.ops.kernels import choice, dispatch

MODULE = types.ModuleType("tests_doubling")
sys.modules[MODULE.__name__] = MODULE


def ran(x, times):
    return x * times + 1000  # so that a test sees which form it was


MODULE.launch = ran


def context(ctx, inputs, output):
    ctx.times = inputs[1]


def backward(ctx, grad):
    return grad * ctx.times, None


@dispatch.in_two_forms(
    "tests_doubling:launch",
    lambda x, times: "times is odd" if times % 2 else None,
    setup_context=context,
    backward=backward,
)
def doubling_for_tests(x: Tensor, times: int) -> Tensor:
    """Times so many."""
    return x * times


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_failed", set())
    dispatch._warned.cache_clear()
    choice.unable.cache_clear()
    yield
    choice.unable.cache_clear()


def test_use_chooses_for_a_while_and_for_good():
    assert kernels.current() == "auto"
    with kernels.use("torch"):
        assert kernels.current() == "torch"
        with kernels.use("auto"):
            assert kernels.current() == "auto"
        assert kernels.current() == "torch"
    assert kernels.current() == "auto"


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("TDM_LIGHTNING_KERNELS", "torch")
    assert kernels.current() == "torch"
    with kernels.use("triton"):
        assert kernels.current() == "triton"
    monkeypatch.setenv("TDM_LIGHTNING_KERNELS", "cuda")
    with pytest.raises(ValueError, match="TDM_LIGHTNING_KERNELS.*one of 'auto'.*got 'cuda'"):
        kernels.current()


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="one of 'auto', 'torch', 'triton', got 'fast'"):
        kernels.use("fast")
    assert kernels.current() == "auto"


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tdm-lightning\[kernels\]'"):
        kernels.use("triton")
    assert kernels.current() == "auto"


def test_forms_give_what_they_should():
    x = torch.ones(2)
    for form, expected in (("auto", 2), ("torch", 2), ("triton", 1002)):
        with kernels.use(form):
            assert doubling_for_tests(x, 2).tolist() == [expected] * 2


def test_on_a_cpu_without_the_interpreter_triton_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice.unable.cache_clear()
    with kernels.use("triton"), pytest.raises(ValueError, match="not on 'cpu'.*TRITON_INTERPRET"):
        doubling_for_tests(torch.ones(2), 2)
    assert doubling_for_tests(torch.ones(2), 2).tolist() == [2, 2]  # auto


def test_a_refusal_is_named_once():
    with kernels.use("triton"):
        with pytest.warns(RuntimeWarning, match="doubling_for_tests takes torch's.*times is odd"):
            assert doubling_for_tests(torch.ones(1), 3).tolist() == [3]
        assert doubling_for_tests(torch.ones(1), 3).tolist() == [3]


def test_a_failing_kernel_falls_back_with_its_reason(monkeypatch):
    def fails(x, times):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(MODULE, "launch", fails)
    with kernels.use("triton"):
        with pytest.warns(RuntimeWarning, match="RuntimeError: no such instruction"):
            assert doubling_for_tests(torch.ones(1), 2).tolist() == [2]
        monkeypatch.setattr(MODULE, "launch", ran)
        assert doubling_for_tests(torch.ones(1), 2).tolist() == [2]  # it is not tried again


def test_out_of_memory_is_no_failing_kernel(monkeypatch):
    def full(x, times):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(MODULE, "launch", full)
    with kernels.use("triton"), pytest.raises(torch.OutOfMemoryError):
        doubling_for_tests(torch.ones(1), 2)


def test_it_is_an_operator():
    x = torch.ones(3, requires_grad=True)
    with kernels.use("triton"):
        doubling_for_tests(x, 4).sum().backward()
        assert x.grad.tolist() == [4] * 3
        compiled = torch.compile(
            lambda x: doubling_for_tests(x, 2) + 1, fullgraph=True, backend="aot_eager"
        )
        assert compiled(torch.ones(2)).tolist() == [1003] * 2
        exported = torch.export.export(Doubling(), (torch.ones(2),)).module()
        assert exported(torch.ones(2)).tolist() == [2, 2]
    torch.library.opcheck(doubling_for_tests.op, (x, 2))


class Doubling(torch.nn.Module):
    def forward(self, x):
        return doubling_for_tests(x, 2)
