"""SViTE: masks that move while the network learns, and the dense network they end in."""

import copy
import itertools
import math

import pytest
import timm
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning import sparsity
from tdm_lightning.sparsity import Structured, Unstructured

DEPTH = 4


def small(strategy, **changes):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": DEPTH, "num_heads": 3, "num_classes": 5}
    return tdm.attach(VisionTransformer(**{**settings, **changes}), strategy)


def train(model, steps, total=None, hook=lambda step: None, lr=1e-2):
    """A training loop of the user's own."""
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        model.strategy.on_progress(0, step, total or steps)
        loss = F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.strategy.after_optimizer_step(model, step + 1, total or steps)
        hook(step + 1)
    return model.eval()


def masks(model):
    return {name: mask.clone() for name, mask in model.strategy.masks.named_buffers() if name != "in_force"}


def perturbed(model):
    """Biases as training leaves them: not zero."""
    with torch.no_grad():
        for block in model.vit.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.bias.normal_()
    return model


KINDS = [Structured(0.7, 0.6), Unstructured(0.4)]


def fresh(kind):
    return type(kind).from_config(kind.config())


# Pure pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.4, 0.5, 0.95, 1.0])
def test_erk_keeps_the_overall_density(density):
    shapes = [tuple(p.shape) for p in timm.create_model("test_vit").parameters() if p.ndim in (2, 4)]
    sizes, shares = [math.prod(shape) for shape in shapes], sparsity.erk_densities(shapes, density)
    assert all(0 < share <= 1 for share in shares)
    assert sum(n * share for n, share in zip(sizes, shares, strict=True)) == pytest.approx(density * sum(sizes))
    scaled = {round(share * n / sum(shape), 9) for n, shape, share in zip(sizes, shapes, shares, strict=True) if share < 1}
    assert len(scaled) <= 1  # one ε for all layers that are not full


def test_the_death_rate_is_a_cosine():
    assert sparsity.death_rate(0, 600) == 0.5
    assert sparsity.death_rate(150, 600) == pytest.approx(0.005 + 0.495 * (1 + math.cos(math.pi / 4)) / 2)
    assert sparsity.death_rate(600, 600) == pytest.approx(0.005)


def test_exchange_by_hand():
    active = torch.tensor([1, 1, 1, 0, 0]).bool()
    worth, promise = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0]), torch.tensor([0.0, 8.0, 0.0, 4.0, 5.0])
    assert sparsity.exchange(active, worth, promise, rate=0.3).tolist() == [True, False, True, False, True]
    assert sparsity.exchange(active, worth, promise, rate=0.3, readmit=True).tolist() == active.tolist()
    # At most as many leave as there are others.
    assert sparsity.exchange(active, worth, promise, rate=1.0).tolist() == [True, False, False, True, True]
    assert sparsity.exchange(torch.ones(5).bool(), worth, promise, rate=0.5).all()


def test_exchange_after_an_overflow():
    active = torch.tensor([1, 1, 0, 0]).bool()
    promise = torch.tensor([0.0, 0.0, torch.nan, 1.0])
    assert sparsity.exchange(active, torch.tensor([torch.inf, 1.0, 0, 0]), promise, 0.5).tolist() == [False, True, False, True]


# Masks at first ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads", "units", "parameters", "macs"),
    [
        ("tiny", 0.7, 0.7, 4_210_600, 868_180_992),
        ("small", 0.7, 0.6, 14_613_352, 2_898_315_264),
        ("base", 0.7, 0.6, 56_836_840, 11_003_633_664),
    ],
)
def test_published_sizes(name, heads, units, parameters, macs):
    model = tdm.attach(timm.create_model(f"deit_{name}_patch16_224"), tdm.SViTE(Structured(heads, units)))
    assert sparsity.active_parameters(model) == parameters
    assert tdm.flops.count_macs(model) == macs


def test_attaching_changes_no_weight_and_training_starts_sparse():
    model = small(tdm.SViTE())
    before = copy.deepcopy(model.vit.state_dict())
    plain = tdm.detach(model).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), plain(x))
    assert all(torch.equal(value, before[name]) for name, value in model.vit.state_dict().items())
    assert not model.strategy.masks.in_force
    model.strategy.on_progress(0, 0, 100)
    assert model.strategy.masks.in_force
    assert model.strategy.masks.enforced(model.vit)
    assert (model.vit.blocks[0].attn.qkv.weight == 0).any(dim=1).sum() == 3 * 8


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_sizes_of_the_first_masks(kind):
    model = small(tdm.SViTE(fresh(kind)))
    found = masks(model)
    if isinstance(kind, Structured):
        counts = {name: int(mask.sum()) for name, mask in found.items()}
        assert counts == {f"heads_{i}": 2 for i in range(DEPTH)} | {f"units_{i}": int(96 * 0.6) for i in range(DEPTH)}
    else:
        weights = [p for p in model.vit.parameters() if p.ndim in (2, 4)]
        assert [tuple(mask.shape) for mask in found.values()] == [tuple(p.shape) for p in weights]
        total = sum(p.numel() for p in weights)
        assert sum(int(mask.sum()) for mask in found.values()) == pytest.approx(0.4 * total, abs=len(weights))
        assert sparsity.active_parameters(model) == sum(p.numel() for p in model.vit.parameters()) - sum(
            int((~mask).sum()) for mask in found.values()
        )
    other, same = masks(small(tdm.SViTE(fresh(kind), seed=1))), masks(small(tdm.SViTE(fresh(kind))))
    assert any(not torch.equal(mask, other[name]) for name, mask in found.items())
    assert all(torch.equal(mask, same[name]) for name, mask in found.items())


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_masks_move_at_every_interval_and_weights_stay_masked(kind):
    model = small(tdm.SViTE(fresh(kind), interval=3))
    history, first = {0: masks(model)}, copy.deepcopy(model.vit)

    def look(step):
        history[step] = masks(model)
        assert model.strategy.masks.enforced(model.vit)

    train(model, 20, hook=look)
    for step, (before, after) in enumerate(itertools.pairwise(history.values()), start=1):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if step % 3 == 0 and step < 0.8 * 20:
            unmoved = set(before) - moved
            assert all(before[name].all() or isinstance(kind, Unstructured) for name in unmoved)
            assert len(moved) > len(before) / 2
        else:
            assert not moved
        assert {name: mask.sum() for name, mask in before.items()} == {name: mask.sum() for name, mask in after.items()}
    if isinstance(kind, Structured):  # what magnitude at initialisation would have kept
        for index, block in enumerate(first.blocks):
            size = block.mlp.fc1.weight.abs().sum(1) + block.mlp.fc2.weight.abs().sum(0)
            units = model.strategy.masks.active(index)[1]
            assert set(size.topk(int(units.sum())).indices.tolist()) != set(units.nonzero().flatten().tolist())
            assert not torch.equal(units, history[0][f"units_{index}"])


def test_exchange_goes_by_heads_output_and_its_gradient():
    """One exchange, recomputed with autograd on the heads' outputs and with the norms of weights and gradients."""
    model = perturbed(small(tdm.SViTE(Structured(0.7, 0.6), interval=1)))
    strategy, before = model.strategy, masks(model)
    model.train()
    strategy.on_progress(0, 0, 10)
    seen = []
    handles = [
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].retain_grad(), seen.append(inputs[0]))[1])
        for block in model.vit.blocks
    ]
    F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5).backward()
    for handle in handles:
        handle.remove()
    strategy.after_optimizer_step(model, 1, 10)  # as after a step of length 0
    rate = sparsity.death_rate(1, 10)
    for index, block in enumerate(model.vit.blocks):
        output, grad = (x.unflatten(-1, (3, 8)) for x in (seen[index].detach(), seen[index].grad))
        worth, promise = (grad * output).sum((1, 3)).abs().mean(0), grad.abs().sum((1, 3)).mean(0)
        active = before[f"heads_{index}"]
        leaves = min((worth[head].item(), head) for head in range(3) if active[head])[1]
        comes = max((promise[head].item(), head) for head in range(3) if not active[head])[1]
        expected = active.clone()
        expected[leaves], expected[comes] = False, True
        heads, units = strategy.masks.active(index)
        assert torch.equal(heads, expected)
        # Units: by ℓ1 norms of row and column, of weights and of gradients.
        active, fc1, fc2 = before[f"units_{index}"], block.mlp.fc1.weight, block.mlp.fc2.weight
        grown = units & ~active
        assert grown.sum() == min(math.ceil(rate * int(active.sum())), int((~active).sum()))
        growth = fc1.grad.abs().sum(1) + fc2.grad.abs().sum(0)
        assert growth[grown].min() >= growth[~active & ~units].max() if (~active & ~units).any() else True
        assert growth[~active].min() > 0  # every unit has a gradient to be judged by
        # What comes in can learn, and changes nothing yet.
        assert (fc1[grown] != 0).all()
        assert (fc2[:, grown] == 0).all()
        query, key, value = block.attn.qkv.weight.view(3, 3, 8, 24)[:, comes]
        assert (query != 0).all()
        assert (key != 0).all()
        assert (value == 0).all()


def test_an_exchange_is_prepared_without_changing_outputs():
    model = perturbed(small(tdm.SViTE(interval=1)))
    sparsity.apply_masks(model)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    model.strategy.on_progress(0, 0, 10)
    assert not model.strategy.masks.enforced(model.vit)
    torch.testing.assert_close(model(x), expected)


def test_units_that_were_never_active_learn():
    model = small(tdm.SViTE(interval=5))
    first = masks(model)
    train(model, 20)
    for index, block in enumerate(model.vit.blocks):
        late = model.strategy.masks.active(index)[1] & ~first[f"units_{index}"]
        assert late.any()
        assert (block.mlp.fc2.weight[:, late] != 0).all()


def test_unstructured_exchange_by_hand():
    model = small(tdm.SViTE(Unstructured(0.4), interval=1))
    strategy = model.strategy
    model.train()
    strategy.on_progress(0, 0, 10)
    F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5).backward()
    weight = model.vit.blocks[1].mlp.fc1.weight
    old, value, grad = strategy.masks.get_buffer("blocks-1-mlp-fc1-weight").clone(), weight.detach().clone(), weight.grad
    strategy.after_optimizer_step(model, 1, 10)
    new, count = strategy.masks.get_buffer("blocks-1-mlp-fc1-weight"), math.ceil(sparsity.death_rate(1, 10) * int(old.sum()))
    kept = old & (value.abs() > value.abs()[old].sort().values[count - 1])
    grown = (grad.abs() >= grad.abs()[~kept].sort(descending=True).values[count - 1]) & ~kept
    assert torch.equal(new, kept | grown)
    assert (weight[new & ~old] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_nothing_stays_on_the_model(kind):
    model = small(tdm.SViTE(fresh(kind), interval=2))

    def look(step):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        if step in (1, 2, 3):
            twin = copy.deepcopy(model).eval()
            assert twin.strategy._vit[0] is twin.vit
            x = torch.randn(2, 3, 16, 16)
            torch.testing.assert_close(twin(x), model.eval()(x))
            model.train()

    train(model, 5, hook=look)
    assert not {"_vit"} & {name.split(".")[1] for name in model.state_dict()}


def test_gradient_checkpointing_gives_the_same_masks():
    plain, saving = small(tdm.SViTE(interval=2)), small(tdm.SViTE(interval=2))
    saving.set_grad_checkpointing()
    train(plain, 6)
    train(saving, 6)
    expected = masks(plain)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(saving).items())


def test_gradients_must_be_there():
    model = small(tdm.SViTE(interval=1))
    with pytest.raises(ValueError, match=r"a training pass that was watched: call on_progress\(\)"):
        model.strategy.after_optimizer_step(model, 1, 10)
    model.train()
    model.strategy.on_progress(0, 0, 10)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    model.zero_grad()
    with pytest.raises(ValueError, match="before the gradients are cleared"):
        model.strategy.after_optimizer_step(model, 1, 10)


# Extraction ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": False}, {"proj_bias": False}, {"qk_norm": True}, {"init_values": 0.1}, {"global_pool": "avg"}],
    ids=str,
)
def test_extraction_is_exact(changes):
    model = small(tdm.SViTE(Structured(0.7, 0.6)), **changes).eval()
    for parameter in model.vit.parameters():
        parameter.normal_(std=0.3)
    sparsity.apply_masks(model)
    before = copy.deepcopy(model.vit.state_dict())
    dense = sparsity.extract_dense(model)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)
    block = dense.blocks[0]
    assert (block.attn.num_heads, block.attn.attn_dim, block.attn.head_dim) == (2, 16, 8)
    assert (block.attn.qkv.out_features, block.attn.proj.in_features) == (48, 16)
    assert (block.mlp.fc1.out_features, block.mlp.fc2.in_features) == (57, 57)
    assert not dense.training
    assert all(torch.equal(value, before[name]) for name, value in model.vit.state_dict().items())
    for fused in (True, False):
        for layer in dense.blocks:
            layer.attn.fused_attn = fused
        torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [
        tdm.TDM(0.6, (1, 2)),
        tdm.TDM(0.6, (1, 2), tdm.TokenMerger(proportional_attention=True)),
        tdm.EViT(0.6, (1, 2)),
        tdm.ToMe(2),
        tdm.EvoViT(0.5, layers=(1, 2)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_extraction_is_exact_under_token_reduction(other):
    model = small([tdm.SViTE(Structured(0.7, 0.6)), other], global_pool=other.global_pool or "token").eval()
    for parameter in model.vit.parameters():
        parameter.normal_(std=0.3)
    sparsity.apply_masks(model)
    again = type(other).from_config(other.config())
    dense = tdm.attach(sparsity.extract_dense(model), again).eval()
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)
    assert tdm.flops.count_macs(dense) == tdm.flops.count_macs(model)
    assert dense.trace(x)[1].token_counts == model.trace(x)[1].token_counts


def test_extraction_after_training():
    model = train(small(tdm.SViTE(interval=3)), 10)
    x = torch.randn(3, 3, 16, 16)
    dense = sparsity.extract_dense(model)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)
    dense(x).sum().backward()  # it can be fine-tuned
    assert all(parameter.grad is not None for parameter in dense.parameters())


def test_what_cannot_be_extracted():
    with pytest.raises(ValueError, match=r"not in force.*apply_masks\(model\)"):
        sparsity.extract_dense(small(tdm.SViTE()))
    with pytest.raises(TypeError, match="these masks are of single weights"):
        sparsity.extract_dense(small(tdm.SViTE(Unstructured())))
    for verb in (sparsity.extract_dense, sparsity.apply_masks, sparsity.adopt_masks, sparsity.active_parameters):
        for model in (small(tdm.TDM(0.7, (1,))), timm.create_model("test_vit")):
            with pytest.raises(TypeError, match="takes a model with masks"):
                verb(model)


@torch.no_grad()
def test_multiply_accumulates_count_the_extracted_model():
    model = small(tdm.SViTE(Structured(0.7, 0.6)))
    plain, report = tdm.flops.count_macs(model.vit), tdm.flops.mac_report(model)
    sparsity.apply_masks(model)
    dense = tdm.flops.count_macs(sparsity.extract_dense(model))
    assert tdm.flops.count_macs(model) == report.backbone == dense < plain == report.plain
    assert tdm.flops.count_macs(small(tdm.SViTE(Unstructured(0.4)))) == plain
    assert tdm.flops.count_macs(model, images=torch.randn(2, 3, 16, 16)) == dense


# Weights from elsewhere ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_official_files_and_their_masks(tmp_path, kind):
    """DeiT's names under ``model``, masks beside them; the zeros are in the weights."""
    author = perturbed(small(tdm.SViTE(fresh(kind), seed=5)))
    sparsity.apply_masks(author)
    file = {"model": author.vit.state_dict(), "mask": {}, "atten_mask": {"x": torch.ones(2)}, "other_mask": {}, "mask_step": 7}
    torch.save(file, tmp_path / "svite.pth")
    model = small(tdm.SViTE(fresh(kind)))
    tdm.checkpoints.load_official(model, tmp_path / "svite.pth")
    assert not model.strategy.masks.enforced(model.vit)
    sparsity.adopt_masks(model)
    expected = masks(author)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model).items())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), author.eval()(x))
    if isinstance(kind, Structured):
        torch.testing.assert_close(sparsity.extract_dense(model)(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_without_any_head_are_not_adopted():
    model = small(tdm.SViTE())
    model.vit.blocks[2].attn.qkv.weight.zero_()
    with pytest.raises(ValueError, match="block 2 has no active head"):
        sparsity.adopt_masks(model)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: small(tdm.SViTE(Structured(heads=0.3))),
            ValueError,
            "heads=0.3 of 3 leaves no head.*at least 0.333",
        ),
        (lambda: small(tdm.SViTE(Structured(units=0.01))), ValueError, "units=0.01 of 96 leaves no unit"),
        (lambda: Structured(heads=0), ValueError, "heads must lie in"),
        (lambda: Structured(units=1.5), ValueError, "units must lie in"),
        (lambda: Unstructured("0.4"), TypeError, "density must be a number"),
        (lambda: tdm.SViTE(masks=0.7), TypeError, r"masks must be Structured\(…\)"),
        (lambda: tdm.SViTE(interval=0), ValueError, "interval must be at least 1"),
        (lambda: tdm.SViTE(until=0), ValueError, "until must lie in"),
        (lambda: tdm.SViTE(death_rate=2), ValueError, "death_rate must lie in"),
        (lambda: tdm.SViTE(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: small(tdm.SViTE(), scale_attn_norm=True), TypeError, "timm's plain Attention and Mlp"),
        (lambda: small(tdm.SViTE(), mlp_layer=SwiGLU), TypeError, "holds Attention and SwiGLU"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_masks_belong_to_one_model():
    strategy = tdm.SViTE()
    small(strategy)
    with pytest.raises(ValueError, match="attached already and owns masks"):
        small(strategy)


def test_full_density_is_the_plain_model():
    model = small(tdm.SViTE(Structured(1.0, 1.0), interval=1))
    train(model, 3)
    assert all(mask.all() for mask in masks(model).values())
    assert tdm.flops.count_macs(model) == tdm.flops.count_macs(model.vit)


@pytest.mark.parametrize("classes", [7, 0])
def test_another_classifier(classes):
    model = small(tdm.SViTE(Unstructured(0.4)))
    kept = masks(model)
    model.reset_classifier(classes)
    sparsity.apply_masks(model)
    found = masks(model)
    assert ("head-weight" in found) == bool(classes)
    assert all(torch.equal(mask, kept[name]) for name, mask in found.items() if name != "head-weight")


# Lightning -----------------------------------------------------------------------------------------------------------


class Record(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append((trainer.global_step, masks(module.model)))


def classifier(**changes):
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": DEPTH}
    recipe = {"warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    strategy = tdm.SViTE(Structured(0.7, 0.6), interval=3)
    return tdm.TokenReductionClassifier("deit_tiny_patch16_224", strategy, 5, model_kwargs=settings, **recipe, **changes)


def fit(module, *callbacks, resume=None, **changes):
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"max_epochs": 4, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = Trainer(accelerator="cpu", callbacks=list(callbacks), **{**settings, **changes})
    run.fit(module, DataLoader(TensorDataset(images, torch.arange(16) % 5), batch_size=4), ckpt_path=resume)


def test_fit_moves_the_masks():
    module, record = classifier(), Record()
    fit(module, record)
    assert [step for step, _ in record.steps] == list(range(1, 17))
    pairs = itertools.pairwise(record.steps)
    changed = [step for (_, old), (step, new) in pairs if any(not torch.equal(old[name], new[name]) for name in new)]
    assert changed == [3, 6, 9, 12]  # and not after 15 of 16 steps
    assert module.model.strategy.masks.enforced(module.model.vit)


def test_accumulated_gradients_count_as_one_step():
    module, calls = classifier(), []
    module.model.strategy.after_optimizer_step = lambda model, step, total: calls.append((model is module.model, step, total))
    fit(module, accumulate_grad_batches=2)
    assert calls == [(True, step, 8) for step in range(1, 9)]


def test_accumulated_gradients_are_judged_together():
    """Two halves of a batch choose the heads that the whole batch chooses."""
    found, images, labels = [], torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    for parts in (1, 2):
        model = perturbed(small(tdm.SViTE(interval=1))).train()
        for some, theirs in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            model.strategy.on_progress(0, 0, 10)
            (F.cross_entropy(model(some), theirs) / parts).backward()
        model.strategy.after_optimizer_step(model, 1, 10)
        found.append(masks(model))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path):
    whole = classifier()
    fit(whole, ModelCheckpoint(tmp_path, "half", every_n_train_steps=8, save_top_k=1, monitor=None))
    resumed = classifier()
    fit(resumed, resume=tmp_path / "half.ckpt")
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    loaded = tdm.TokenReductionClassifier.load_from_checkpoint(tmp_path / "half.ckpt", map_location="cpu")
    assert loaded.model.strategy.config() == whole.model.strategy.config()
    sparsity.extract_dense(loaded.model)


def work(rank, folder):
    """One of two processes: its half of the batch, gradients averaged as DistributedDataParallel does."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = one_exchange(part=rank, parts=2)
    torch.save(masks(model), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_exchange(part, parts):
    model = perturbed(small(tdm.SViTE(interval=1))).train()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.strategy.on_progress(0, 0, 10)
    F.cross_entropy(model(images.chunk(parts)[part]), (torch.arange(8) % 5).chunk(parts)[part]).backward()
    for parameter in model.parameters() if parts > 1 else ():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= parts
    model.strategy.after_optimizer_step(model, 1, 10)
    return model


@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="needs fork, to start quickly")
def test_processes_decide_alike_and_as_one_would(tmp_path):
    torch.multiprocessing.start_processes(work, args=(tmp_path,), nprocs=2, start_method="fork")
    expected = masks(one_exchange(part=0, parts=1))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
