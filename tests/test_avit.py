"""A-ViT: against the official code, against one image and token at a time, and with halted tokens really gone."""

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from tdm_lightning.callbacks import DiversityMonitor
from timm.layers import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader

import tdm_lightning as tdm
from tdm_lightning.strategies.avit import prior_divergence, prior_target
from tdm_lightning.tokens import Role
from tests.trainers import QUIET

#: With these weights and this gate tokens halt after every block, class tokens too.
GATE = {"gate_scale": 1.5, "gate_center": 2.0}


def spread(vit):
    """Weights that make states differ between tokens, while channel 0 rises: so they halt at different blocks."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
                parameter.normal_(std=0.05 if name.startswith("patch") else 0.25)
            elif name.endswith(("pos_embed", "norm1.bias", "norm2.bias")):
                parameter.normal_(std=0.5)
            elif "gamma" in name:
                parameter.fill_(0.7)
            elif name.startswith("head") and name.endswith("weight"):
                parameter.normal_(std=0.1)
        for block in vit.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[0] *= 0.6
                layer.bias[0] = 0.4
    return vit.eval()


def make_vit(**kwargs):
    """16 patches, 6 blocks."""
    torch.manual_seed(1)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5, **kwargs}
    return spread(VisionTransformer(**arguments))


def small(vit=None, **kwargs):
    return tdm.attach(make_vit() if vit is None else vit, tdm.AViT(**{**GATE, **kwargs})).eval()


def masking(model):
    """The same model in the form of training: halted tokens stay and are masked."""
    other = tdm.attach(model.vit, copy.deepcopy(model.strategy))
    other.strategy.train()
    return other


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# The official code ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_official_masking(official):
    facts, tensors, model = official("avit_a", tdm.AViT(gate_scale=10, gate_center=30))
    assert facts["method"]["halting_eps"] == model.strategy.eps
    accumulated = []
    model.vit.norm.register_forward_pre_hook(lambda norm, inputs: accumulated.append(inputs[0]))
    model.strategy.train()
    output = model.run(tensors["input"], trace=True)
    active = tensors["active"].bool()
    close(output.logits, tensors["logits"])
    close(output.features, tensors["features"], 2e-4)
    close(accumulated[0], tensors["accumulated"], 1e-3)
    scores = torch.stack(output.carry["scores"])
    close(scores, tensors["halting"] * active)
    assert torch.equal(output.carry["blocks"], tensors["counter"].float())
    close(output.carry["ponder"], tensors["rho"])
    close(output.carry["ponder"] - output.carry["blocks"], tensors["remainder"])
    close((scores.cumsum(0) * active)[:-1], (tensors["cumulative"] * active)[:-1])
    counts = torch.stack(output.trace.token_counts)
    assert torch.equal(counts + active[:, :, 0], tensors["tokens_per_layer"])


@torch.no_grad()
def test_official_inference_with_halted_tokens_gone(official):
    _, tensors, model = official("avit_a", tdm.AViT(gate_scale=10, gate_center=30))
    output = model.run(tensors["input"], trace=True)
    close(output.logits, tensors["logits"])
    runs = tensors["active"][:, :, 0].long()  # an image is there as long as its class token
    assert torch.equal(torch.stack(output.trace.token_counts), (tensors["tokens_per_layer"] - 1) * runs)
    assert runs.sum(0).tolist() == [12, 12, 9]
    complete = tensors["counter"] <= runs.sum(0).unsqueeze(1)
    assert 0 < (~complete).sum() < 65
    close(output.features[complete], tensors["features"][complete], 2e-4)


def test_official_losses(golden):
    _, tensors = golden("avit_a")
    torch.testing.assert_close(prior_target(12, 8, 1), tensors["loss.prior_target"], atol=1e-6, rtol=1e-4)
    halting = tensors["halting"]
    close(halting[:, 1:].mean((1, 2)), tensors["halting_score_layer"], 1e-6)  # without the first image, as there
    torch.testing.assert_close(prior_divergence(halting[:, 1:], 8, 1), tensors["loss.prior_kl"], atol=0, rtol=1e-4)


@torch.no_grad()
def test_official_ponder_loss(official):
    _, tensors, model = official("avit_a", tdm.AViT(gate_scale=10, gate_center=30, ponder_weight=1e-3))
    model.strategy.train()
    terms = model.strategy.loss(model.run(tensors["input"]), torch.tensor([0, 1, 2]), F.cross_entropy)
    torch.testing.assert_close(terms["ponder"], 1e-3 * tensors["loss.mean_rho"], atol=0, rtol=1e-4)
    torch.testing.assert_close(terms["task"], F.cross_entropy(tensors["logits"], torch.tensor([0, 1, 2])), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("other", [{"gate_scale": 10.5}, {"gate_center": 32.0}, {"eps": 0.3}])
def test_settings_change_the_official_case(official, other):
    _, tensors, model = official("avit_a", tdm.AViT(**{"gate_scale": 10, "gate_center": 30, **other}))
    assert (model(tensors["input"]) - tensors["logits"]).abs().max() > 1e-3


# One image and token at a time ---------------------------------------------------------------------------------------


def slowly(vit, image, strategy, waits_for=None):
    """The definition, for one image of 3×H×W: features before the final norm, blocks run and remainder of every token.

    Halted tokens are left out of what the blocks get. The whole image ends with the tokens in ``waits_for``.
    """
    states = vit._pos_embed(vit.patch_embed(image[None]))[0]
    alive, spent = list(range(len(states))), [0.0] * len(states)
    sums, blocks, rest = torch.zeros_like(states), [0] * len(states), [0.0] * len(states)
    for index, block in enumerate(vit.blocks):
        out = block(states[alive][None])[0]
        last, going = index == len(vit.blocks) - 1, []
        for token, state in zip(alive, out, strict=True):
            score = torch.sigmoid(strategy.gate_scale * state[0] - strategy.gate_center).item()
            states[token], blocks[token] = state, blocks[token] + 1
            if not last and spent[token] + score < 1 - strategy.eps:
                going.append((token, score))
        ended = waits_for is not None and not any(token in waits_for for token, _ in going)
        going = [] if ended else going
        for token in set(alive) - {token for token, _ in going}:
            rest[token] = 1 - spent[token]
            sums[token] += rest[token] * states[token]
        for token, score in going:
            sums[token] += score * states[token]
            spent[token] += score
        alive = [token for token, _ in going]
        if not alive:
            break
    return sums, torch.tensor(blocks), torch.tensor(rest)


@given(scale=st.sampled_from([0.5, 1.0, 3.0]), center=st.floats(-2, 8), eps=st.sampled_from([0.01, 0.2]))
@torch.no_grad()
def test_both_forms_follow_the_definition(scale, center, eps):
    model = small(gate_scale=scale, gate_center=center, eps=eps)
    torch.manual_seed(4)
    images = torch.randn(3, 3, 32, 32)
    masked = masking(model).run(images, trace=True)
    removed = model.run(images, trace=True)
    for i, image in enumerate(images):
        sums, blocks, rest = slowly(model.vit, image, model.strategy)
        close(masked.features[i], model.vit.norm(sums), 1e-4)
        assert torch.equal(masked.carry["blocks"][i].long(), blocks)
        close(masked.carry["ponder"][i], blocks + rest, 1e-5)
        assert [count[i].item() for count in masked.trace.token_counts] == [(blocks[1:] > at).sum() for at in range(6)]
        sums, blocks, _ = slowly(model.vit, image, model.strategy, waits_for={0})
        close(removed.features[i], model.vit.norm(sums), 1e-4)
        assert [count[i].item() for count in removed.trace.token_counts] == [(blocks[1:] > at).sum() for at in range(6)]
    close(removed.logits, masked.logits, 1e-5)


MODELS = {
    "class token": make_vit,
    "registers": lambda: make_vit(reg_tokens=3),
    "layer scale": lambda: make_vit(init_values=0.5),
    "average pooling": lambda: make_vit(global_pool="avg"),
    "no class token": lambda: make_vit(global_pool="avg", class_token=False),
    "attention pooling": lambda: make_vit(global_pool="map"),
    "another norm": lambda: make_vit(qk_norm=True, norm_layer=RmsNorm),
    "distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "rotary": lambda: timm_model("eva02_tiny_patch14_224", patch_size=8),
    "relative bias": lambda: timm_model("beit_base_patch16_224"),
}
CENTERS = {"registers": 4.0, "no class token": 3.0, "another norm": 9.0, "distilled": 3.0, "rotary": 4.0, "relative bias": 4.0}


def timm_model(name, **kwargs):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5}
    return spread(timm.create_model(name, **{**small, **kwargs}))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_removal_equals_masking(name, images):
    """On every kind of model; images differ in length, and where the head reads leading tokens some leave early."""
    model = small(MODELS[name](), gate_center=CENTERS.get(name, 2.0))
    logits, removed = model.trace(images)
    expected, masked = masking(model).trace(images)
    close(logits, expected, 1e-5)
    assert (logits - model.vit(images)).abs().amax(1).min() > 1e-3
    found, kept = torch.stack(removed.token_counts), torch.stack(masked.token_counts)
    here = found > 0
    assert torch.equal(found[here], kept[here])
    assert (found.diff(dim=0) <= 0).all()
    assert len(found.unique()) > 3
    assert found[-1].sum() < 4 * 16


# What is computed ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fewer_rows_enter_the_matmuls(images):
    model = small()
    rows = {index: [] for index in range(6)}
    for index, block in enumerate(model.vit.blocks):
        for layer in (block.attn.qkv, block.mlp.fc1):
            layer.register_forward_pre_hook(lambda layer, inputs, index=index: rows[index].append(inputs[0].shape[:2]))
    model(images)
    blocks = [slowly(model.vit, image, model.strategy, waits_for={0})[1] for image in images]
    for index, shapes in rows.items():
        present = [run for run in blocks if run[0] > index]
        longest = max(1 + int((run[1:] > index).sum()) for run in present)
        assert shapes[:2] == [(len(present), longest)] * 2
    assert [len(run) for run in (blocks, [r for r in blocks if r[0] > 5])] == [4, 2]


@torch.no_grad()
def test_multiply_accumulates_are_those_of_the_rows(images):
    model = small()
    image = images[0]
    report = tdm.flops.mac_report(model, images=image[None])
    _, blocks, _ = slowly(model.vit, image, model.strategy, waits_for={0})
    for index, block in enumerate(report.blocks):
        n = int((blocks > index).sum())
        assert block.tokens == max(0, n - 1)
        assert block.attention == 4 * n * 32**2 + 2 * n**2 * 32
        assert block.mlp == 8 * n * 32**2
    assert report.backbone < report.plain
    assert report.strategy == 0
    assert tdm.flops.count_macs(model, images=images[:1]) == report.backbone
    # Together images cost more than alone, by the padding only.
    alone = [tdm.flops.mac_report(model, images=image[None]).backbone for image in images]
    assert sum(alone) / 4 <= tdm.flops.mac_report(model, images=images).backbone < report.plain
    with pytest.raises(ValueError, match="another number of tokens for each image"):
        tdm.flops.mac_report(model)


@torch.no_grad()
def test_images_that_all_leave_at_once_end_the_pass(images):
    model = small(gate_center=-100.0)
    calls = []
    for index, block in enumerate(model.vit.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    logits, trace = model.trace(images)
    assert calls == [0]
    assert [count.tolist() for count in trace.token_counts] == [[16] * 4] + [[0] * 4] * 5
    first = model.vit.blocks[0](model.vit._pos_embed(model.vit.patch_embed(images)))
    close(logits, model.vit.head(model.vit.norm(first)[:, 0]), 1e-5)
    assert tdm.flops.mac_report(model, images=images).blocks[1].mlp == 0
    assert model.forward_intermediates(images, indices=[3], intermediates_only=True)[0].shape == (4, 32, 4, 4)
    assert len(small(gate_center=-100.0).trace(images[:1])[1].layers) == 1


@torch.no_grad()
def test_without_halting_it_is_the_plain_model(images):
    model = small(gate_center=1e4)
    close(model(images), model.vit(images), 1e-6)
    close(masking(model)(images), model.vit(images), 1e-6)
    close(model.forward_features(images), model.vit.forward_features(images), 1e-5)
    assert model.trace(images)[1].layers == []


# Laws ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images):
    model = small()
    together, trace = model.trace(images)
    order = torch.tensor([2, 0, 3, 1])
    close(model(images[order]), together[order], 1e-5)
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1])
        close(alone[0], together[i], 1e-5)
        assert [count.item() for count in own.token_counts] == [count[i].item() for count in trace.token_counts]
        fates = {layer.index: layer.assignment[i] for layer in trace.layers}
        for layer in own.layers:
            assert torch.equal(layer.assignment[0], fates[layer.index])


@torch.no_grad()
def test_the_trace_accounts_for_every_patch_of_every_image(images):
    model = small()
    _, trace = model.trace(images)
    assert [layer.index for layer in trace.layers] == [2, 3, 4, 5]
    runs = torch.stack([slowly(model.vit, image, model.strategy, waits_for={0})[1][1:] for image in images])
    for layer in trace.layers:
        kept = runs > layer.index
        assert torch.equal(layer.assignment, torch.where(kept, kept.cumsum(1) - 1, -1))
        assert torch.equal(layer.role == Role.KEPT, kept)
        assert torch.equal(layer.role == Role.DROPPED, ~kept)
        assert torch.equal(trace.token_counts[layer.index], kept.sum(1))
        assert len(layer.importance) == 4


@torch.no_grad()
def test_intermediate_maps_hold_every_image(images):
    model = small()
    states = [{} for _ in images]
    for image, seen in zip(images, states, strict=True):
        handles = [
            tap.register_forward_hook(lambda tap, inputs, x, at=at, seen=seen: seen.update({at: x}))
            for at, tap in enumerate(model.taps)
        ]
        model(image[None])
        for handle in handles:
            handle.remove()
    final, maps = model.forward_intermediates(images, indices=[2, 5], output_fmt="NLC", return_prefix_tokens=True)
    assert final.shape == (4, 17, 32)
    runs = torch.stack([slowly(model.vit, image, model.strategy, waits_for={0})[1] for image in images])
    for at, (dense, prefix) in zip([2, 5], maps, strict=True):
        assert dense.shape == (4, 16, 32)
        assert torch.equal(dense.abs().sum(-1) > 0, runs[:, 1:] > at)
        for i in range(4):
            if runs[i, 0] > at:
                close(dense[i][runs[i, 1:] > at], states[i][at][0, 1:], 1e-5)
                close(prefix[i], states[i][at][0, :1], 1e-5)
            else:
                assert not len(states[i][at])
                assert not prefix[i].any()


def test_a_pass_leaves_nothing_behind(images):
    model = small()
    before = {name: str(value) for name, value in vars(model.strategy).items()}
    first = model(images)
    masking(model).run(images)
    model.trace(images[:1])
    assert torch.equal(model(images), first)
    assert {name: str(value) for name, value in vars(model.strategy).items()} == before
    assert list(model.strategy.state_dict()) == []
    other = tdm.attach(make_vit(depth=2), model.strategy)
    assert other(images).shape == (4, 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("center", [2.5, -100.0])
def test_half_precision_stays_finite(images, dtype, center):
    model = small(gate_center=center).to(dtype)
    output = model.run(images.to(dtype))
    assert output.logits.isfinite().all()
    assert output.features.dtype == dtype
    assert masking(model)(images.to(dtype)).isfinite().all()


# Training ------------------------------------------------------------------------------------------------------------


def test_the_loss_has_its_terms(images):
    model = small(ponder_weight=0.5, prior_weight=2.0, prior_mean=3.0, prior_std=1.5).train()
    output = model.run(images)
    target = torch.tensor([0, 1, 2, 3])
    terms = model.strategy.loss(output, target, F.cross_entropy)
    assert list(terms) == ["task", "ponder", "prior"]
    close(terms["task"], F.cross_entropy(output.logits, target))
    close(terms["ponder"], 0.5 * output.carry["ponder"].mean())
    density = torch.distributions.Normal(3.0, 1.5).log_prob(torch.arange(6.0)).exp()
    wanted = density * 0.98 / density[:3].sum()
    share = torch.stack(output.carry["scores"]).mean((1, 2))
    share = (share / share.sum()).clamp(0.01, 0.99)
    close(terms["prior"], 2 * torch.nn.KLDivLoss(reduction="batchmean")(share.log(), wanted), 1e-5)
    assert terms["prior"] > 0
    close(model.strategy.report(output, target)["blocks"], output.carry["blocks"].mean())
    model.eval()
    assert list(model.strategy.loss(model.run(images), target, F.cross_entropy)) == ["task"]


def test_a_negative_divergence_asks_for_nothing():
    target = prior_target(3, 8, 3.0)  # all blocks before the mean
    assert target.sum() == pytest.approx(0.98)
    share = target / target.sum()
    assert (target * (target / share).log()).sum() < 0
    assert prior_divergence(share.view(3, 1, 1), 8, 3.0) == 0
    assert prior_divergence(share.flip(0).view(3, 1, 1), 8, 3.0) > 0


def test_weights_of_a_token_sum_to_one(images):
    output = masking(small()).run(images)
    scores, blocks = torch.stack(output.carry["scores"]), output.carry["blocks"]
    before_halting = torch.arange(6).view(6, 1, 1) < blocks - 1
    close((scores * before_halting).sum(0) + output.carry["ponder"] - blocks, torch.ones(4, 17), 1e-6)
    assert blocks.unique().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("term", ["task", "ponder", "prior"])
def test_every_term_teaches_channel_0(images, term):
    model = small().train()
    terms = model.strategy.loss(model.run(images), torch.tensor([0, 1, 2, 3]), F.cross_entropy)
    terms[term].backward()
    for block in model.vit.blocks[:4]:
        gradient = block.mlp.fc2.weight.grad
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() > 0
    if term == "ponder":  # the last block's scores decide nothing
        assert model.vit.blocks[5].mlp.fc2.weight.grad is None


@pytest.mark.parametrize("center", [2.5, -100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_finite(images, center, dtype):
    """Also where an image has no token left to attend to, and where all scores are 0."""
    model = small(gate_center=center).train()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = model.strategy.loss(model.run(images), torch.tensor([0, 1, 2, 3]), F.cross_entropy)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.vit.patch_embed.proj.weight.grad.any()


def test_halted_tokens_get_no_gradient_from_later_blocks(images):
    model = small(gate_center=-100.0).train()
    model(images).sum().backward()
    assert model.vit.blocks[0].mlp.fc1.weight.grad.any()
    for block in model.vit.blocks[1:]:
        assert block.mlp.fc1.weight.grad is None or not block.mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_checkpointed_gradients_are_the_same(images, training):
    found = []
    for enable in (False, True):
        model = small()
        model.strategy.train(training)
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            close(again, plain, 1e-5)


def test_ponder_loss_shortens_the_run(images):
    model = small(ponder_weight=1.0, prior_weight=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    blocks = []
    for _ in range(12):
        output = model.run(images)
        blocks.append(model.strategy.report(output, None)["blocks"].item())
        optimizer.zero_grad()
        model.strategy.loss(output, torch.tensor([0, 1, 2, 3]), F.cross_entropy)["ponder"].backward()
        optimizer.step()
    assert blocks[-1] < blocks[0] - 0.5


# Around it -----------------------------------------------------------------------------------------------------------


def test_published_files_load_and_name_their_gate(official, tmp_path):
    _, tensors, model = official("avit_a", tdm.AViT())
    weights = {key[11:]: value for key, value in tensors.items() if key.startswith("state_dict.")}
    path = tmp_path / "tiny-10-30.pth"
    torch.save({"model": weights, "epoch": 99}, path)
    fresh = tdm.attach(copy.deepcopy(model.vit), tdm.AViT.from_file_name(path, eps=0.02))
    torch.nn.init.zeros_(fresh.vit.head.weight)
    assert tdm.checkpoints.load_official(fresh, path).untouched == ()
    assert torch.equal(fresh.vit.head.weight, weights["head.weight"])
    strategy = tdm.AViT.from_file_name("weights/small-10-75.pth")
    assert (strategy.gate_scale, strategy.gate_center) == (10, 75)
    assert (fresh.strategy.gate_center, fresh.strategy.eps) == (30, 0.02)
    assert tdm.AViT.from_file_name("a-0.5-7.5").gate_scale == 0.5
    for name in ("small.pth", "small-75.pth", "small-10-75-best.pth"):
        with pytest.raises(ValueError, match="does not end in gate scale and center"):
            tdm.AViT.from_file_name(name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate_scale": 0}, ValueError, "gate_scale must be finite and above 0"),
        ({"gate_scale": "10"}, TypeError, "gate_scale must be a number"),
        ({"gate_center": float("nan")}, ValueError, "gate_center must be finite"),
        ({"gate_center": float("-inf")}, ValueError, "gate_center must be finite"),
        ({"gate_center": True}, TypeError, "gate_center must be a number"),
        ({"eps": 0}, ValueError, "eps must be finite and above 0"),
        ({"eps": 1.0}, ValueError, r"eps must lie in \(0, 1\)"),
        ({"ponder_weight": -1}, ValueError, "ponder_weight must be finite and at least 0"),
        ({"prior_weight": float("inf")}, ValueError, "prior_weight must be finite"),
        ({"prior_mean": 0}, ValueError, "prior_mean must be finite and above 0"),
        ({"prior_std": 0.0}, ValueError, "prior_std must be finite and above 0"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.AViT(**arguments)


def test_config_round_trip():
    strategy = tdm.AViT(5, 12.5, prior_mean=4)
    again = tdm.AViT.from_config(strategy.config())
    assert again.config() == strategy.config()
    assert again.gate_center == 12.5


@torch.no_grad()
def test_pictures_of_images_that_leave(images):
    from tdm_lightning.visualize import panels

    model = small()
    drawn = panels(model, images[0])
    trace = model.trace(images[:1])[1]
    assert (trace.layers[-1].assignment < 0).all()
    assert [f"block {layer.index + 1}" for layer in trace.layers] == [name for name in drawn if name.startswith("block")]


def test_diversity_of_images_that_have_left(images, tmp_path):
    """An image without tokens counts as one without diversity, also where no image is left."""

    class Module(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def validation_step(self, batch, index):
            self.model(batch)

    def scores(center):
        monitor = DiversityMonitor()
        trainer = Trainer(
            **QUIET,
            callbacks=[monitor],
            default_root_dir=tmp_path,
        )
        trainer.validate(Module(small(gate_center=center)), DataLoader(images, batch_size=4), verbose=False)
        return monitor.scores["val"]

    assert scores(-100.0)[1:] == [0] * 5
    assert scores(-100.0)[0] > 0
