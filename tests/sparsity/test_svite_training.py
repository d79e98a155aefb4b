"""SViTE: masks that move while the network learns, in a loop of one's own and in Lightning."""

import copy
import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning import sparsity
from tdm_lightning.sparsity import Structured, Unstructured
from tests.helpers.svites import DEPTH, KINDS, fresh, masks, perturbed, small, train

# Training -------------------------------------------------------------------------------------


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
        assert {name: mask.sum() for name, mask in before.items()} == {
            name: mask.sum() for name, mask in after.items()
        }
    if isinstance(kind, Structured):  # what magnitude at initialisation would have kept
        for index, block in enumerate(first.blocks):
            size = block.mlp.fc1.weight.abs().sum(1) + block.mlp.fc2.weight.abs().sum(0)
            units = model.strategy.masks.active(index)[1]
            assert set(size.topk(int(units.sum())).indices.tolist()) != set(
                units.nonzero().flatten().tolist()
            )
            assert not torch.equal(units, history[0][f"units_{index}"])


def test_exchange_goes_by_heads_output_and_its_gradient():
    """One exchange, recomputed with autograd on the heads' outputs and with the norms of weights
    and gradients.
    """
    model = perturbed(small(tdm.SViTE(Structured(0.7, 0.6), interval=1)))
    strategy, before = model.strategy, masks(model)
    model.train()
    strategy.on_progress(0, 0, 10)
    seen = []
    handles = [
        block.attn.proj.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].retain_grad(), seen.append(inputs[0]))[1]
        )
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
        assert (
            growth[grown].min() >= growth[~active & ~units].max()
            if (~active & ~units).any()
            else True
        )
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
    model.objective.on_progress(0, 0, 10)
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
    old, value, grad = (
        strategy.masks.get_buffer("blocks-1-mlp-fc1-weight").clone(),
        weight.detach().clone(),
        weight.grad,
    )
    strategy.after_optimizer_step(model, 1, 10)
    new, count = (
        strategy.masks.get_buffer("blocks-1-mlp-fc1-weight"),
        math.ceil(sparsity.death_rate(1, 10) * int(old.sum())),
    )
    kept = old & (value.abs() > value.abs()[old].sort().values[count - 1])
    grown = (grad.abs() >= grad.abs()[~kept].sort(descending=True).values[count - 1]) & ~kept
    assert torch.equal(new, kept | grown)
    assert (weight[new & ~old] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_nothing_stays_on_the_model(kind):
    model = small(tdm.SViTE(fresh(kind), interval=2))

    def look(step):
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
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
        model.objective.after_optimizer_step(model, 1, 10)
    model.train()
    model.objective.on_progress(0, 0, 10)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    model.zero_grad()
    with pytest.raises(ValueError, match="before the gradients are cleared"):
        model.objective.after_optimizer_step(model, 1, 10)


# Lightning ------------------------------------------------------------------------------------


class Record(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append((trainer.global_step, masks(module.model)))


def classifier(**changes):
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": DEPTH}
    recipe = {"warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    strategy = tdm.SViTE(Structured(0.7, 0.6), interval=3)
    return tdm.TokenReductionClassifier(
        "deit_tiny_patch16_224", strategy, 5, model_kwargs=settings, **recipe, **changes
    )


def fit(module, *callbacks, resume=None, **changes):
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {
        "max_epochs": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings["enable_checkpointing"] = any(
        isinstance(callback, ModelCheckpoint) for callback in callbacks
    )
    run = Trainer(accelerator="cpu", callbacks=list(callbacks), **{**settings, **changes})
    run.fit(
        module,
        DataLoader(TensorDataset(images, torch.arange(16) % 5), batch_size=4),
        ckpt_path=resume,
    )


def test_fit_moves_the_masks():
    module, record = classifier(), Record()
    fit(module, record)
    assert [step for step, _ in record.steps] == list(range(1, 17))
    pairs = itertools.pairwise(record.steps)
    changed = [
        step
        for (_, old), (step, new) in pairs
        if any(not torch.equal(old[name], new[name]) for name in new)
    ]
    assert changed == [3, 6, 9, 12]  # and not after 15 of 16 steps
    assert module.model.strategy.masks.enforced(module.model.vit)


def test_accumulated_gradients_count_as_one_step():
    module, calls = classifier(), []
    module.model.strategy.after_optimizer_step = lambda model, step, total: calls.append(
        (model is module.model, step, total)
    )
    fit(module, accumulate_grad_batches=2)
    assert calls == [(True, step, 8) for step in range(1, 9)]


def test_accumulated_gradients_are_judged_together():
    """Two halves of a batch choose the heads that the whole batch chooses."""
    found, images, labels = [], torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    for parts in (1, 2):
        model = perturbed(small(tdm.SViTE(interval=1))).train()
        for some, theirs in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            model.objective.on_progress(0, 0, 10)
            (F.cross_entropy(model(some), theirs) / parts).backward()
        model.objective.after_optimizer_step(model, 1, 10)
        found.append(masks(model))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path):
    whole = classifier()
    fit(whole, ModelCheckpoint(tmp_path, "half", every_n_train_steps=8, save_top_k=1, monitor=None))
    resumed = classifier()
    fit(resumed, resume=tmp_path / "half.ckpt")
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    loaded = tdm.TokenReductionClassifier.load_from_checkpoint(
        tmp_path / "half.ckpt", map_location="cpu"
    )
    assert loaded.model.strategy.config() == whole.model.strategy.config()
    sparsity.extract_dense(loaded.model)


def work(rank, folder):
    """One of two processes: its half of the batch, gradients averaged as DistributedDataParallel
    does.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = one_exchange(part=rank, parts=2)
    torch.save(masks(model), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_exchange(part, parts):
    model = perturbed(small(tdm.SViTE(interval=1))).train()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.objective.on_progress(0, 0, 10)
    F.cross_entropy(
        model(images.chunk(parts)[part]), (torch.arange(8) % 5).chunk(parts)[part]
    ).backward()
    for parameter in model.parameters() if parts > 1 else ():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= parts
    model.objective.after_optimizer_step(model, 1, 10)
    return model


@pytest.mark.skipif(
    "fork" not in torch.multiprocessing.get_all_start_methods(),
    reason="needs fork, to start quickly",
)
def test_processes_decide_alike_and_as_one_would(tmp_path):
    torch.multiprocessing.start_processes(work, args=(tmp_path,), nprocs=2, start_method="fork")
    expected = masks(one_exchange(part=0, parts=1))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
