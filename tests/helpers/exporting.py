"""What compiled and exported models must give; for the tests of every strategy."""

import onnxruntime
import torch

import tdm_lightning as tdm

_CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def check_compiled(model, images, backend="eager"):
    """One graph, the same logits, and an eager model that is as it was."""
    eager = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), eager, **_CLOSE)
    assert torch.equal(model(images), eager)


def check_exported(model, images):
    """A program of ``torch.export`` gives the same logits for batches of 1, 2 and 3."""
    eager = model(images)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 2, 3):
        torch.testing.assert_close(program(images[:size]), eager[:size], **_CLOSE)
    assert torch.equal(model(images), eager)


def check_onnx(model, images, path):
    """ONNX Runtime gives the same logits for batches of 1 and 3."""
    eager = model(images)
    tdm.export.export_onnx(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 3):
        (found,) = session.run(None, {session.get_inputs()[0].name: images[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), eager[:size], **_CLOSE)
    assert torch.equal(model(images), eager)
