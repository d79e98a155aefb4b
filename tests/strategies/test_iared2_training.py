"""IA-RED²: its reward, the policy gradient and the curriculum."""

import pytest
import torch
from lightning.pytorch import Trainer
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning.core import Output
from tdm_lightning.strategies.iared2 import PolicyState
from tests.helpers.iared2s import LABELS, small
from tests.helpers.trainers import QUIET
from tests.helpers.vits import grouped


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# Reward and policy gradient -------------------------------------------------------------------


def outcome(kept, right, group=0):
    """A pass over four images of class 0 with ten patches."""
    wrong = ~torch.tensor(right)
    state = PolicyState(10, group, torch.tensor(kept))
    return Output(F.one_hot(wrong.long(), 3).float(), torch.zeros(4, 1, 2), None, state)


@pytest.mark.parametrize("soft", [False, True])
def test_rewards_by_hand(soft):
    target = torch.zeros(4, dtype=torch.int64)
    target = 0.6 * F.one_hot(target, 3) + 0.1 if soft else target
    kept, right = [10, 5, 0, 5], [True, True, True, False]
    rewards = [
        tdm.IARED2().reward(outcome(kept, right, group), target).tolist() for group in range(3)
    ]
    assert rewards[0] == pytest.approx([0, 0.75, 1, -3])
    assert rewards[1] == pytest.approx([0, 0.5, 2 / 3, -5])
    assert rewards[2] == pytest.approx([0, 0.25, 1 / 3, -8])
    others = tdm.IARED2(groups=4, penalty=[1, 2])
    assert [others.reward(outcome(kept, right, group), target)[3].item() for group in range(4)] == [
        -1,
        -2,
        -2,
        -2,
    ]


def test_policy_gradient_by_hand(images):
    model = small().train()
    strategy = model.strategy
    strategy.on_progress(0, 0, 1)
    output, baseline = model.run(images, trace=True), strategy.second_pass(model, images)
    (layer,) = output.trace.layers
    drawn = (layer.assignment >= 0).float()
    x = model.vit._pos_embed(model.vit.patch_embed(images)).detach()
    score = strategy.interpreters[0](x[:, :1], x[:, 1:])
    log_probability = torch.distributions.Bernoulli(score).log_prob(drawn).sum(1)
    torch.testing.assert_close(output.state.log_probability, log_probability)
    advantage = strategy.reward(output, LABELS) - strategy.reward(baseline, LABELS)
    terms = strategy.loss(output, LABELS, F.cross_entropy, baseline)
    assert terms.keys() == {"policy"}
    torch.testing.assert_close(terms["policy"], -(advantage * log_probability).mean())


def test_padding_has_no_part_in_the_policy(images):
    """After a group has decided, images are padded: alone, they have the same probability."""
    model = small().train()
    model.objective.on_progress(30, 0, 1)
    output = model.run(images)
    counts = (model.eval().trace(images)[1].token_counts)[0]
    assert len(set(counts.tolist())) > 1
    assert (output.state.kept <= counts).all()
    scores = [model.trace(image[None])[1].layers[1].importance for image in images]
    least = torch.stack([torch.minimum(score, 1 - score).log().sum() for score in scores])
    most = torch.stack([torch.maximum(score, 1 - score).log().sum() for score in scores])
    assert (output.state.log_probability >= least - 1e-4).all()
    assert (output.state.log_probability <= most + 1e-4).all()


def test_draws_vary_and_follow_the_scores(images):
    model = small().train()
    model.objective.on_progress(0, 0, 1)
    passes = [model.run(images, trace=True).trace.layers[0] for _ in range(100)]
    share = torch.stack([(layer.assignment >= 0).float() for layer in passes]).mean(0)
    assert (share - passes[0].importance).abs().max() < 0.2
    assert share.std() > 0.05


def test_baseline_is_inference_without_a_trace_of_it(images):
    model = small().train()
    strategy = model.strategy
    strategy.on_progress(0, 0, 1)
    state = torch.get_rng_state()
    baseline = strategy.second_pass(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert strategy.training
    assert strategy.interpreters.training
    assert not baseline.logits.requires_grad
    assert torch.equal(baseline.logits, model.eval().run(images).logits)
    strategy.on_progress(10, 0, 1)
    assert (
        strategy.second_pass(model.train(), images) is None
    )  # blocks learn the task, and need none
    strategy.on_progress(0, 0, 1)
    output = model.run(images)
    with pytest.raises(ValueError, match="strategy.second_pass"):
        strategy.loss(output, LABELS, F.cross_entropy)


class Markers:
    """Pictures whose class is the colour of one patch among noise, anywhere."""

    def __init__(self):
        self.colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0]])

    def draw(self, n):
        label, where = torch.randint(4, (n,)), torch.randint(16, (n,))
        patches = 0.3 * torch.randn(n, 4, 4, 3, 2, 2)
        patches.flatten(1, 2)[torch.arange(n), where] += self.colours[label][:, :, None, None]
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 8, 8), label, where


def test_the_expected_reward_rises():
    """One policy gradient stage finds the patch that matters and drops the rest, at no cost in
    accuracy.
    """
    data = Markers()
    vit = VisionTransformer(
        img_size=8, patch_size=2, embed_dim=32, depth=3, num_heads=2, num_classes=4
    )
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    for _ in range(120):
        images, labels, _ = data.draw(48)
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    model = tdm.attach(vit, tdm.IARED2()).train()
    strategy = model.strategy
    strategy.on_progress(0, 0, 1)
    images, labels, where = data.draw(128)

    @torch.no_grad()
    def expected():
        return (
            torch.stack([strategy.reward(model.run(images), labels).mean() for _ in range(8)])
            .mean()
            .item()
        )

    optimizer = torch.optim.AdamW(strategy.parameters(), lr=2e-3)
    history = [expected()]
    for step in range(90):
        pictures, classes, _ = data.draw(48)
        terms = strategy.loss(
            model.run(pictures), classes, F.cross_entropy, strategy.second_pass(model, pictures)
        )
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if step % 30 == 29:
            history.append(expected())
    assert history == sorted(history)
    assert history[-1] > max(0.8, history[0] + 0.5)
    logits, trace = model.eval().trace(images)
    kept = trace.layers[0].assignment >= 0
    assert kept.float().mean() < 0.3
    assert kept.gather(1, where[:, None]).float().mean() > 0.95
    assert (logits.argmax(1) == labels).float().mean() > 0.95


# Curriculum -----------------------------------------------------------------------------------


def trained(model, images):
    """Names of the parameters that a step's loss reaches."""
    model.zero_grad()
    strategy = model.strategy
    sum(
        strategy.loss(
            model.run(images), LABELS, F.cross_entropy, strategy.second_pass(model, images)
        ).values()
    ).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("group", [0, 1, 2])
def test_each_stage_trains_its_part_only(images, group):
    model = small().train()
    names = {name for name, _ in model.named_parameters()}
    model.objective.on_progress(30 * group, 0, 1)
    assert trained(model, images) == {
        f"strategy.interpreters.{group}.qk.{kind}" for kind in ("weight", "bias")
    }
    later = {
        name
        for block in range(2 * group, 6)
        for name in names
        if name.startswith(f"vit.blocks.{block}.")
    }
    for epoch in (30 * group + 10, 30 * group + 29):
        model.objective.on_progress(epoch, 0, 1)
        assert trained(model, images) == later | {
            name for name in names if name.startswith(("vit.norm.", "vit.head."))
        }


def test_settled_groups_infer_and_later_ones_wait(images):
    model = small().train()
    model.objective.on_progress(30, 0, 1)
    first, again = (model.run(images, trace=True).trace for _ in range(2))
    assert [layer.index for layer in first.layers] == [0, 2]
    waiting = model.eval().trace(images)[1]
    assert [layer.index for layer in waiting.layers] == [0, 2]  # in validation too
    model.objective.on_progress(89, 0, 1)
    settled = model.trace(images)[1].layers
    assert len(settled) == 3
    assert torch.equal(first.layers[0].assignment, again.layers[0].assignment)
    assert torch.equal(first.layers[0].assignment, settled[0].assignment)
    assert not torch.equal(first.layers[1].assignment, again.layers[1].assignment)


def test_the_stage_follows_from_the_epoch_alone(images):
    walked, fresh = (
        tdm.IARED2(2, interpreter_epochs=1, block_epochs=2),
        tdm.IARED2(2, interpreter_epochs=1, block_epochs=2),
    )
    expected = [
        (0, True),
        (0, False),
        (0, False),
        (1, True),
        (1, False),
        (1, False),
        (1, False),
        (1, False),
    ]
    for epoch, stage in enumerate(expected):
        walked.on_progress(epoch, 10 * epoch, 80)
        fresh.__init__(2, interpreter_epochs=1, block_epochs=2)
        fresh.on_progress(epoch, 0, 80)
        assert walked.stage == fresh.stage == stage


def fitting(tmp_path, epochs, **kwargs):
    return Trainer(
        **QUIET,
        max_epochs=epochs,
        default_root_dir=tmp_path,
        **kwargs,
    )


def test_a_run_resumed_in_the_middle_of_the_curriculum(tmp_path):
    """Two of six stages, then the third in a new process' objects: only the second group's
    interpreter has moved.
    """
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 5), batch_size=4)

    def module():
        return tdm.TokenReductionClassifier(
            "deit_tiny_patch16_224",
            tdm.IARED2(penalty=[0.5], interpreter_epochs=1, block_epochs=1, interpreter_lr=1e-2),
            num_classes=5,
            model_kwargs={
                "img_size": 32,
                "patch_size": 8,
                "embed_dim": 32,
                "depth": 6,
                "num_heads": 2,
            },
            lr=1e-3,
            min_lr=1e-3,
            warmup_epochs=0,
            mixup=0.0,
            cutmix=0.0,
            train_in_eval_mode=True,
        )

    first = fitting(tmp_path, 2, enable_checkpointing=False)
    first.fit(module(), data)
    assert {"train/reward", "train/kept"} <= set(first.callback_metrics)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    before = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    again = module()
    fitting(tmp_path, 3, enable_checkpointing=False).fit(
        again, data, ckpt_path=tmp_path / "middle.ckpt"
    )
    assert again.model.strategy.stage == (1, True)
    moved = {
        name for name, value in again.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {f"model.strategy.interpreters.1.qk.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize("epoch", [0, 10, 30, 40])
def test_recomputed_blocks_draw_the_same_policy(images, epoch):
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        model.objective.on_progress(epoch, 0, 1)
        torch.manual_seed(5)
        trained(model, images)
        gradients.append(
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("epoch", [0, 10])
def test_autocast_trains_with_finite_gradients(images, epoch):
    model = small().train()
    model.objective.on_progress(epoch, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        names = trained(model, images)
    assert names
    assert all(model.get_parameter(name).grad.isfinite().all() for name in names)


def test_optimizer_groups():
    model = small()
    groups, found = grouped(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, group in found.items():
        decays = model.get_parameter(name).ndim > 1 and name not in (
            "vit.pos_embed",
            "vit.cls_token",
        )
        assert group["lr"] == (4e-5 if name.startswith("strategy.") else 1e-3)
        assert group["weight_decay"] == (0.05 if decays else 0.0)
    torch.optim.AdamW(groups)
