"""Images that keep different numbers of tokens, in one batch."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.ops import pack
from tdm_lightning.strategies import Strategy


class Bright(Strategy):
    """Keeps the patches whose first channel is positive."""

    adaptive = True

    def __init__(self, layer: int = 1) -> None:
        super().__init__()
        self.layer = layer

    def before_block(self, index, tokens):
        return tokens.packed(index, tokens.patches[..., 0] > 0) if index >= self.layer else tokens


class Rows(Strategy):
    """Computes the first half of the patches in one block, and those only from then on."""

    def requires(self):
        return tdm.Requirements(rows=True)

    def rows(self, index, tokens):
        return 1 + tokens.count // 2 if index == 1 else None


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(4, 3, 32, 32)


def vit(**arguments):
    torch.manual_seed(1)
    return timm.create_model("test_vit", img_size=32, patch_size=8, **arguments).eval()


@pytest.mark.parametrize("kept", [[[1, 0, 1], [0, 1, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]])
def test_pack_gathers_in_order(kept):
    kept = torch.tensor(kept, dtype=torch.bool)
    index, valid = pack(kept)
    for row, positions, real in zip(kept, index, valid, strict=True):
        assert positions[real].tolist() == row.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "arguments", [{}, {"global_pool": "avg", "class_token": False}, {"global_pool": "avgmax"}]
)
def test_a_batch_gives_what_its_images_give_alone(arguments, images):
    model = tdm.attach(vit(**arguments), Bright())
    together, trace = model.trace(images)
    alone = [model.trace(image[None]) for image in images]
    torch.testing.assert_close(
        together, torch.cat([logits for logits, _ in alone]), atol=1e-5, rtol=1e-5
    )
    for index, counts in enumerate(trace.token_counts):
        assert counts.tolist() == [single.token_counts[index].item() for _, single in alone]
    assert len(set(trace.token_counts[-1].tolist())) > 1


def test_trace_accounts_for_every_patch(images):
    trace = tdm.attach(vit(), Bright()).trace(images)[1]
    for layer in trace.layers:
        held = (layer.assignment >= 0).sum(dim=1)
        assert torch.equal(held, trace.token_counts[layer.index])
        assert torch.equal(layer.role == Role.DROPPED, layer.assignment < 0)


def test_every_patch_may_go(images):
    class Nothing(Bright):
        def before_block(self, index, tokens):
            return (
                tokens.packed(index, torch.zeros_like(tokens.valid_patches))
                if index == 1
                else tokens
            )

    logits, trace = tdm.attach(vit(), Nothing()).trace(images)
    assert logits.isfinite().all()
    assert trace.token_counts[-1].tolist() == [0] * 4


def test_chosen_rows_leave_as_they_would_among_all(images):
    plain, chosen = tdm.attach(vit(), Strategy()), tdm.attach(vit(), Rows())
    full, few = [], []
    plain.hook_points[1].register_forward_hook(lambda point, inputs, x: full.append(x))
    chosen.hook_points[1].register_forward_hook(lambda point, inputs, x: few.append(x))
    plain(images), chosen(images)
    torch.testing.assert_close(few[0], full[0][:, :9], atol=1e-5, rtol=1e-5)
    assert tdm.flops.count_macs(chosen) < tdm.flops.count_macs(plain)


def test_blocks_that_compute_all_rows_say_so(images):
    with pytest.raises(TypeError, match="chosen rows"):
        tdm.attach(
            timm.create_model("test_vit", img_size=32, patch_size=8, attn_layer="diff").eval(),
            Rows(),
        )(images)
