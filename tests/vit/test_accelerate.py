"""A pass as a CUDA graph: when it is replayed, and when the model runs as it is."""

import contextlib
import copy
import importlib
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tdm_lightning as tdm
from tests.helpers.compares import Positive

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
module = importlib.import_module("tdm_lightning.vit.accelerate")  # its function has its name
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def model(strategy=None):
    return tdm.attach(VisionTransformer(**SMALL), strategy or tdm.TDM(0.5, (1,))).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


# On a CPU


@pytest.mark.parametrize("make", [model, lambda: VisionTransformer(**SMALL).eval()])
def test_on_a_cpu_the_model_runs_as_it_is(make, images):
    inner = make()
    fast = tdm.accelerate(inner, images)
    assert isinstance(fast, tdm.Accelerated)
    assert not fast.captured
    assert fast.model is inner
    assert not fast.training
    for batch in (images, images[:1]):
        assert torch.equal(fast(batch), inner(batch))
    assert fast(images).requires_grad


def test_what_is_refused(images):
    with pytest.raises(ValueError, match="training mode.*call model.eval"):
        tdm.accelerate(model().train(), images)
    with pytest.raises(ValueError, match="Positive keeps another number of tokens"):
        tdm.accelerate(nn.Sequential(model(Positive())).eval(), images)
    with pytest.raises(ValueError, match="on cpu and the example on meta"):
        tdm.accelerate(model(), images.to("meta"))
    with pytest.raises(TypeError, match="a module and a batch of images, got TokenReducedViT"):
        tdm.accelerate(model(), [1, 2])


# With CUDA's parts played by others


class Graph:
    """Replays by running what was captured once more, into the same output."""

    def __init__(self):
        self.run = None
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.run()


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def faked(monkeypatch):
    """The CPU is taken for a device with graphs; one runs the model that was captured."""
    passes = []

    @contextlib.contextmanager
    def capture(graph):
        passes.append(graph)
        yield

    class Recorded(module._Graph):
        def __init__(self, inner, example):
            super().__init__(inner, example)
            output = self.output

            def again():
                with torch.no_grad():
                    output.copy_(inner(self.images))

            self.graph.run = again

    for name, fake in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(module, "_Graph", Recorded)
    monkeypatch.setattr(module, "_has_graphs", lambda device: True)
    return passes


def replays(fast):
    return fast._graph.graph.replays


@torch.no_grad()
def test_equal_images_replay_and_others_do_not(faked, images):
    inner = model()
    fast = tdm.accelerate(inner, images)
    assert fast.captured
    assert len(faked) == 1
    other = torch.randn(2, 3, 32, 32)
    first = fast(other)
    assert replays(fast) == 1
    assert torch.equal(first, inner(other))
    second = fast(images)
    assert replays(fast) == 2
    assert torch.equal(first, inner(other))  # the first answer is not overwritten
    assert torch.equal(second, inner(images))
    with torch.inference_mode():
        fast(images)
    assert replays(fast) == 3
    for batch in (images[:1], torch.randn(3, 3, 32, 32)):
        assert torch.equal(fast(batch), inner(batch))
    inner.bfloat16()
    assert fast(images.bfloat16()).dtype == torch.bfloat16
    assert replays(fast) == 3


def test_gradients_and_training_run_eagerly(faked, images):
    fast = tdm.accelerate(model(), images)
    fast(images).sum().backward()
    assert all(weight.grad is not None for weight in fast.model.vit.parameters())
    with torch.no_grad():
        fast.train()
        fast(images)
        fast.eval()
    assert replays(fast) == 0
    for weight in fast.parameters():
        weight.requires_grad_(False)
    fast(images)
    assert replays(fast) == 1
    fast(images.clone().requires_grad_())
    assert replays(fast) == 1


@torch.no_grad()
def test_another_autocast_runs_eagerly(faked, images, monkeypatch):
    fast = tdm.accelerate(model(), images)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with monkeypatch.context() as inside:
        inside.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        fast(images)
        assert replays(fast) == 0
        fast.refresh(images)
        fast(images)
        assert replays(fast) == 1
    fast(images)
    assert replays(fast) == 1


@torch.no_grad()
def test_weights_changed_in_place_are_seen(faked, images):
    fast = tdm.accelerate(model(), images)
    before = fast(images)
    fast.model.vit.head.bias.add_(1)
    torch.testing.assert_close(fast(images), before + 1)
    assert replays(fast) == 2


@torch.no_grad()
def test_the_graph_holds_the_weights_that_it_reads(faked, images):
    fast = tdm.accelerate(model(), images)
    held = {tensor.data_ptr() for tensor in fast._graph.read}
    assert held >= {tensor.data_ptr() for tensor in fast.parameters()}


@torch.no_grad()
def test_a_moved_module_and_a_copy_have_no_graph(faked, images):
    fast = tdm.accelerate(model(), images)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not other.captured
        assert torch.equal(other(images), fast(images))
    assert fast.captured
    assert not fast.bfloat16().captured
    fast.refresh(images.bfloat16())
    assert fast.captured


def test_accelerated_in_inference_mode_serves_without_it(faked, images):
    with torch.inference_mode():
        fast = tdm.accelerate(model(), images)
    assert not fast._graph.images.is_inference()
    with torch.no_grad():
        fast(images)
    assert replays(fast) == 1


def test_what_cannot_be_captured_is_named(faked, images, monkeypatch):
    def fail(self, model, example):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module._Graph, "__init__", fail)
    with pytest.raises(ValueError, match="cannot capture a pass of TokenReducedViT.*not permitted"):
        tdm.accelerate(model(), images)


# On a GPU


@ON_CUDA
@torch.inference_mode()
def test_a_graph_gives_the_models_logits():
    inner, images = model().cuda(), torch.randn(2, 3, 32, 32, device="cuda")
    fast = tdm.accelerate(inner, torch.zeros_like(images))
    assert fast.captured
    torch.testing.assert_close(fast(images), inner(images))
    torch.testing.assert_close(fast(images[:1]), inner(images[:1]))
