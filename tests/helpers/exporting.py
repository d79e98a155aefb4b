"""What compiled and exported models must give; for the tests of every strategy."""

import onnxruntime
import torch

from tdm_lightning.export.files import save_onnx, trace_model

_CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def check_compiled(model, images, backend="eager"):
    """One graph, the same logits, and an eager model that is as it was."""
    eager = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), eager, **_CLOSE)
    assert torch.equal(model(images), eager)


def check_exported(model, images, onnx=None):
    """A program of ``torch.export`` gives the same logits for batches of 1, 2 and 3, and so does
    ONNX Runtime where a path for its file is given: both from one trace.
    """
    eager = model(images)
    program = trace_model(model, tuple(images.shape[1:]))
    found = {"program": program.module()}
    if onnx is not None:
        save_onnx(program, onnx, optimize=False)  # what only makes it smaller takes long
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        found["onnx"] = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    for size in (1, 2, 3):
        for run in found.values():
            torch.testing.assert_close(run(images[:size]), eager[:size], **_CLOSE)
    assert torch.equal(model(images), eager)
