"""Fidelity to the unreduced model."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import tdm_lightning as tdm
from benchmarks.fidelity.__main__ import fidelity
from benchmarks.runner import run
from benchmarks.study.__main__ import study
from benchmarks.study.fidelity import TRAINING_FREE, Watcher, compare, observed, to_patches
from benchmarks.study.plan import METHODS
from benchmarks.study.results import read_fidelity

SHAPE = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 32,
    "num_heads": 2,
    "depth": 12,
    "num_classes": 0,
}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **SHAPE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 48)


def test_the_plain_model_is_true_to_itself(vit, images):
    plain = observed(vit, tdm.Strategy(), images)
    assert plain[0].shape == (2, 36, 32)
    assert plain[1].shape == (2, 3, 36)
    for scores in compare(plain, plain):
        assert scores == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.name in TRAINING_FREE], ids=lambda m: m.name
)
def test_watching_changes_nothing(vit, images, method):
    strategy = method.make(0.5)
    expected, trace = tdm.attach(vit, strategy).trace(images)
    model = tdm.attach(vit, [Watcher((7, 8, 9)), method.make(0.5)])
    output = model.run(images, trace=True)
    torch.testing.assert_close(output.logits, expected)
    assert output.trace.token_counts == trace.token_counts
    assert sorted(output.state[0].seen) == [7, 8, 9]


def test_the_attention_that_was_seen_is_the_class_tokens(vit, images):
    seen = tdm.attach(vit, [Watcher((9,)), tdm.Strategy()]).run(images, trace=True).state[0].seen[9]
    captured = {}
    vit.blocks[9].attn.register_forward_pre_hook(
        lambda module, inputs: captured.update(x=inputs[0])
    )
    vit(images)
    attn, x = vit.blocks[9].attn, captured["x"]
    qkv = attn.qkv(x).reshape(2, 37, 3, 2, 16).permute(2, 0, 3, 1, 4)
    row = (qkv[0][:, :, :1] @ qkv[1].transpose(-2, -1) * attn.scale).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(seen, row)


def test_dropped_patches_count_as_nothing(vit, images):
    plain = observed(vit, tdm.Strategy(), images)
    reduced = observed(vit, tdm.TopK(0.5, layers=(3,)), images)
    dropped = reduced[0].abs().sum(-1) == 0
    assert dropped.sum(1).tolist() == [18, 18]
    assert reduced[1][dropped.unsqueeze(1).expand_as(reduced[1])].abs().sum() == 0
    for image, (features, held, _) in enumerate(compare(plain, reduced)):
        kept = ~dropped[image]
        by_hand = F.cosine_similarity(plain[0][image, kept], reduced[0][image, kept], dim=-1)
        assert features == pytest.approx(by_hand.sum().item() / 36, abs=1e-6)
        assert held == pytest.approx(by_hand.mean().item(), abs=1e-6)


def test_a_tokens_attention_is_shared_by_its_patches():
    attention, source = torch.rand(3, 5), torch.tensor([[0, 1, 1, 2, 3, 4, 4, 4]]).expand(3, -1)
    dense = to_patches(attention, source)
    torch.testing.assert_close(dense.sum(1), attention.sum(1))
    torch.testing.assert_close(dense[:, 5], attention[:, 4] / 3)


def test_command(tmp_path):
    pytest.importorskip("skimage")
    weights = timm.create_model("deit_tiny_patch16_224", **SHAPE).state_dict()
    torch.save({"model": weights}, tmp_path / "vit.pth")
    shape = "{" + ", ".join(f"{key}: {value}" for key, value in SHAPE.items()) + "}"
    arguments = [
        "--model=deit_tiny_patch16_224",
        f"--model_kwargs={shape}",
        "--methods=[TDM]",
        "--rates=[0.7,0.4]",
    ]
    run(fidelity, [*arguments, f"--weights={tmp_path / 'vit.pth'}", f"--out={tmp_path}"])
    found = read_fidelity(tmp_path)
    assert {(one.method, one.rate) for one in found} == {("TDM", 0.7), ("TDM", 0.4)}
    assert all(-1 <= one.features <= 1 for one in found)
    assert {one.photograph for one in found} == {
        "china",
        "flower",
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
    }
    panels = Image.open(tmp_path / "panels.png")
    assert panels.width > 4 * 448
    assert panels.height > 6 * 448
    (tmp_path / "fidelity.png").unlink()
    assert [path.name for path in run(study, [f"--out={tmp_path}"])] == ["fidelity.png"]


def test_random_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="untrained"):
        run(fidelity, [f"--out={tmp_path}"])
