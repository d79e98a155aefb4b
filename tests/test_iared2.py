"""IA-RED²: its decisions, its reward, its curriculum."""

import math

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning.checkpoints import load_official
from tdm_lightning.strategies.interpreter import MultiHeadInterpreter
from tdm_lightning.tokens import Output, Role
from tests.trainers import QUIET

LABELS = torch.tensor([0, 1, 2, 3])


def small(strategy=None, std=0.3, **kwargs):
    """16 patches, 6 blocks in 3 groups; interpreters that tell patches apart around the threshold."""
    torch.manual_seed(1)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5, **kwargs}
    vit = VisionTransformer(**arguments)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
                parameter.normal_(std=0.25)
        vit.pos_embed.normal_(std=0.5)
    model = tdm.attach(vit, tdm.IARED2() if strategy is None else strategy)
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            parameter.normal_(std=std)
        for interpreter in model.strategy.interpreters:  # so that few patches go at a time
            interpreter.qk.bias.fill_(0.4)
    return model


def keep_all(model):
    for interpreter in model.strategy.interpreters:
        torch.nn.init.zeros_(interpreter.qk.weight)
        torch.nn.init.ones_(interpreter.qk.bias)
    return model


def keep_none(model, group=0):
    qk = keep_all(model).strategy.interpreters[group].qk
    torch.nn.init.constant_(qk.bias[: len(qk.bias) // 3], -1)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


# Decisions -----------------------------------------------------------------------------------------------------------


def test_scores_against_their_definition():
    interpreter = MultiHeadInterpreter(24, 3)
    torch.nn.init.normal_(interpreter.qk.weight, std=0.3)
    torch.nn.init.normal_(interpreter.qk.bias)
    tokens = torch.randn(2, 6, 24) * 3
    found = interpreter(tokens[:, :1], tokens[:, 1:])
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, k, _ = interpreter.qk(normed).chunk(3, dim=-1)
    for image in range(2):
        for patch in range(5):
            heads = [slice(8 * h, 8 * h + 8) for h in range(3)]
            logits = [(q[image, 0, h] @ k[image, patch + 1, h] / math.sqrt(8)).item() for h in heads]
            expected = sum(1 / (1 + math.exp(-logit)) for logit in logits) / 3
            assert found[image, patch].item() == pytest.approx(expected, abs=1e-5)


def masked_pass(model, images):
    """As the authors' tool infers: all tokens stay, dropped ones are zeroed and masked out of the attention."""
    vit, strategy = model.vit, model.strategy
    x = vit._pos_embed(vit.patch_embed(images))
    policy, kept = torch.ones(x.shape[:2]), []
    for index, block in enumerate(vit.blocks):
        if index % 2 == 0:
            x = x * policy.unsqueeze(-1)
            interpreter = strategy.interpreters[index // 2]
            q, k, _ = interpreter.qk(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, interpreter.heads, -1)).unbind(2)
            logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) / math.sqrt(q.shape[-1])
            policy = (logits.sigmoid().mean(1) * policy > strategy.threshold).float()
            policy[:, 0] = 1
            x = x * policy.unsqueeze(-1)
            kept.append(policy[:, 1:].bool())
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        both = (policy.unsqueeze(1) * policy.unsqueeze(2)).bool().unsqueeze(1)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~both, -torch.inf).softmax(-1).nan_to_num()
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return vit.head(vit.norm(x)[:, 0]), kept


@pytest.mark.parametrize("arguments", [{}, {"threshold": 0.6}, {"heads": 4}])
@torch.no_grad()
def test_removal_gives_what_masking_gives(images, arguments):
    model = small(tdm.IARED2(**arguments)).eval()
    logits, trace = model.trace(images)
    expected, kept = masked_pass(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert [layer.index for layer in trace.layers] == [0, 2, 4]
    for layer, stays in zip(trace.layers, kept, strict=True):
        assert torch.equal(layer.assignment >= 0, stays)
        assert torch.equal(layer.role == Role.KEPT, stays)
        assert torch.equal(trace.token_counts[layer.index], stays.sum(1))
    counts = torch.stack(trace.token_counts)
    assert (counts.diff(dim=0) <= 0).all()
    assert 0 < counts[-1].float().mean() < counts[0].float().mean() < 16
    assert len(set(counts[-1].tolist())) > 1


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images):
    model = small().eval()
    together, trace = model.trace(images)
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])


@torch.no_grad()
def test_scores_above_the_threshold_give_the_plain_model(images):
    model = keep_all(small()).eval()
    torch.testing.assert_close(model(images), model.vit(images), atol=1e-6, rtol=1e-6)
    never = small(tdm.IARED2(threshold=0.0)).eval()
    torch.testing.assert_close(never(images), never.vit(images), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_training_starts_from_the_plain_model(images):
    vit = timm.create_model("test_vit", img_size=64).eval()
    model = tdm.attach(vit, tdm.IARED2())
    pictures = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(pictures), vit(pictures), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_image_may_lose_all_of_its_patches(images, group, training, pool):
    model = keep_none(small(global_pool=pool), group).train(training)
    model.strategy.on_progress(0 if group == 0 else 61, 0, 1)  # drawn while its own group learns, thresholded before
    with torch.no_grad():
        model.strategy.interpreters[group].qk.bias.mul_(10)
    output = model.run(images, trace=True)
    assert output.logits.isfinite().all()
    assert output.trace.token_counts[-1].tolist() == [0] * 4
    sum(model.strategy.loss(output, LABELS, F.cross_entropy, model.strategy.baseline(model, images)).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_fewer_rows_enter_the_matmuls(images):
    """Multiply-accumulates as if each image had as many tokens as the longest, the first decision before any block."""
    model = small().eval()
    longest = [int(count.max()) + 1 for count in model.trace(images)[1].token_counts]
    assert longest[0] < 17
    report, width = tdm.flops.mac_report(model, images=images), 32
    for block, n in zip(report.blocks, longest, strict=True):
        assert block.attention == 4 * n * width**2 + 2 * n**2 * width
        assert block.mlp == 8 * n * width**2
        assert block.strategy == 0
    entering = [16, longest[1] - 1, longest[3] - 1]
    assert report.learned == sum(2 * width**2 + 2 * n * width for n in entering)


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 6_050_920), ("small", 23_381_224), ("base", 91_882_984)])
def test_parameters_of_the_published_weights(name, parameters):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224")
    model = tdm.attach(vit, tdm.IARED2())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [interpreter.heads for interpreter in model.strategy.interpreters] == [vit.blocks[0].attn.num_heads] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite(images, dtype):
    model = small().eval()
    model.vit.pos_embed.mul_(30)
    logits = model.to(dtype)(images.to(dtype))
    assert logits.isfinite().all()
    assert logits.dtype == dtype


# Reward and policy gradient ------------------------------------------------------------------------------------------


def outcome(kept, right, group=0):
    """A pass over four images of class 0 with ten patches."""
    wrong = ~torch.tensor(right)
    carry = {"kept": torch.tensor(kept), "initial": 10, "group": group}
    return Output(F.one_hot(wrong.long(), 3).float(), torch.zeros(4, 1, 2), None, carry)


@pytest.mark.parametrize("soft", [False, True])
def test_rewards_by_hand(soft):
    target = torch.zeros(4, dtype=torch.int64)
    target = 0.6 * F.one_hot(target, 3) + 0.1 if soft else target
    kept, right = [10, 5, 0, 5], [True, True, True, False]
    rewards = [tdm.IARED2().reward(outcome(kept, right, group), target).tolist() for group in range(3)]
    assert rewards[0] == pytest.approx([0, 0.75, 1, -3])
    assert rewards[1] == pytest.approx([0, 0.5, 2 / 3, -5])
    assert rewards[2] == pytest.approx([0, 0.25, 1 / 3, -8])
    others = tdm.IARED2(groups=4, penalty=[1, 2])
    assert [others.reward(outcome(kept, right, group), target)[3].item() for group in range(4)] == [-1, -2, -2, -2]


def test_policy_gradient_by_hand(images):
    model = small().train()
    strategy = model.strategy
    strategy.on_progress(0, 0, 1)
    output, baseline = model.run(images, trace=True), strategy.baseline(model, images)
    (layer,) = output.trace.layers
    drawn = (layer.assignment >= 0).float()
    x = model.vit._pos_embed(model.vit.patch_embed(images)).detach()
    score = strategy.interpreters[0](x[:, :1], x[:, 1:])
    log_probability = torch.distributions.Bernoulli(score).log_prob(drawn).sum(1)
    torch.testing.assert_close(output.carry["log_probability"], log_probability)
    advantage = strategy.reward(output, LABELS) - strategy.reward(baseline, LABELS)
    terms = strategy.loss(output, LABELS, F.cross_entropy, baseline)
    assert terms.keys() == {"policy"}
    torch.testing.assert_close(terms["policy"], -(advantage * log_probability).mean())


def test_padding_has_no_part_in_the_policy(images):
    """After a group has decided, images are padded: alone, they have the same probability."""
    model = small().train()
    model.strategy.on_progress(30, 0, 1)
    output = model.run(images)
    counts = (model.eval().trace(images)[1].token_counts)[0]
    assert len(set(counts.tolist())) > 1
    assert (output.carry["kept"] <= counts).all()
    scores = [model.trace(image[None])[1].layers[1].importance for image in images]
    least = torch.stack([torch.minimum(score, 1 - score).log().sum() for score in scores])
    most = torch.stack([torch.maximum(score, 1 - score).log().sum() for score in scores])
    assert (output.carry["log_probability"] >= least - 1e-4).all()
    assert (output.carry["log_probability"] <= most + 1e-4).all()


def test_draws_vary_and_follow_the_scores(images):
    model = small().train()
    model.strategy.on_progress(0, 0, 1)
    passes = [model.run(images, trace=True).trace.layers[0] for _ in range(100)]
    share = torch.stack([(layer.assignment >= 0).float() for layer in passes]).mean(0)
    assert (share - passes[0].importance).abs().max() < 0.2
    assert share.std() > 0.05


def test_baseline_is_inference_without_a_trace_of_it(images):
    model = small().train()
    strategy = model.strategy
    strategy.on_progress(0, 0, 1)
    state = torch.get_rng_state()
    baseline = strategy.baseline(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert strategy.training
    assert strategy.interpreters.training
    assert not baseline.logits.requires_grad
    assert torch.equal(baseline.logits, model.eval()(images))
    strategy.on_progress(10, 0, 1)
    assert strategy.baseline(model.train(), images) is None  # blocks learn the task, and need none
    strategy.on_progress(0, 0, 1)
    output = model.run(images)
    with pytest.raises(ValueError, match="strategy.baseline"):
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
    """One policy gradient stage finds the patch that matters and drops the rest, at no cost in accuracy."""
    data = Markers()
    vit = VisionTransformer(img_size=8, patch_size=2, embed_dim=32, depth=3, num_heads=2, num_classes=4)
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
        return torch.stack([strategy.reward(model.run(images), labels).mean() for _ in range(8)]).mean().item()

    optimizer = torch.optim.AdamW(strategy.parameters(), lr=2e-3)
    history = [expected()]
    for step in range(90):
        pictures, classes, _ = data.draw(48)
        terms = strategy.loss(model.run(pictures), classes, F.cross_entropy, strategy.baseline(model, pictures))
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


# Curriculum ----------------------------------------------------------------------------------------------------------


def trained(model, images):
    """Names of the parameters that a step's loss reaches."""
    model.zero_grad()
    strategy = model.strategy
    sum(strategy.loss(model.run(images), LABELS, F.cross_entropy, strategy.baseline(model, images)).values()).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("group", [0, 1, 2])
def test_each_stage_trains_its_part_only(images, group):
    model = small().train()
    names = {name for name, _ in model.named_parameters()}
    model.strategy.on_progress(30 * group, 0, 1)
    assert trained(model, images) == {f"strategy.interpreters.{group}.qk.{kind}" for kind in ("weight", "bias")}
    later = {name for block in range(2 * group, 6) for name in names if name.startswith(f"vit.blocks.{block}.")}
    for epoch in (30 * group + 10, 30 * group + 29):
        model.strategy.on_progress(epoch, 0, 1)
        assert trained(model, images) == later | {name for name in names if name.startswith(("vit.norm.", "vit.head."))}


def test_settled_groups_infer_and_later_ones_wait(images):
    model = small().train()
    model.strategy.on_progress(30, 0, 1)
    first, again = (model.run(images, trace=True).trace for _ in range(2))
    assert [layer.index for layer in first.layers] == [0, 2]
    waiting = model.eval().trace(images)[1]
    assert [layer.index for layer in waiting.layers] == [0, 2]  # in validation too
    model.strategy.on_progress(89, 0, 1)
    settled = model.trace(images)[1].layers
    assert len(settled) == 3
    assert torch.equal(first.layers[0].assignment, again.layers[0].assignment)
    assert torch.equal(first.layers[0].assignment, settled[0].assignment)
    assert not torch.equal(first.layers[1].assignment, again.layers[1].assignment)


def test_the_stage_follows_from_the_epoch_alone(images):
    walked, fresh = tdm.IARED2(2, interpreter_epochs=1, block_epochs=2), tdm.IARED2(2, interpreter_epochs=1, block_epochs=2)
    expected = [(0, True), (0, False), (0, False), (1, True), (1, False), (1, False), (1, False), (1, False)]
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
    """Two of six stages, then the third in a new process' objects: only the second group's interpreter has moved."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 5), batch_size=4)

    def module():
        return tdm.TokenReductionClassifier(
            "deit_tiny_patch16_224",
            tdm.IARED2(penalty=[0.5], interpreter_epochs=1, block_epochs=1, interpreter_lr=1e-2),
            num_classes=5,
            model_kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2},
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
    fitting(tmp_path, 3, enable_checkpointing=False).fit(again, data, ckpt_path=tmp_path / "middle.ckpt")
    assert again.model.strategy.stage == (1, True)
    moved = {name for name, value in again.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.strategy.interpreters.1.qk.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize("epoch", [0, 10, 30, 40])
def test_recomputed_blocks_draw_the_same_policy(images, epoch):
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        model.strategy.on_progress(epoch, 0, 1)
        torch.manual_seed(5)
        trained(model, images)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("epoch", [0, 10])
def test_autocast_trains_with_finite_gradients(images, epoch):
    model = small().train()
    model.strategy.on_progress(epoch, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        names = trained(model, images)
    assert names
    assert all(model.get_parameter(name).grad.isfinite().all() for name in names)


def test_optimizer_groups():
    model = small()
    groups = model.strategy.param_groups(model, lr=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        decays = model.get_parameter(name).ndim > 1 and name not in ("vit.pos_embed", "vit.cls_token")
        assert group["lr"] == (4e-5 if name.startswith("strategy.") else 1e-3)
        assert group["weight_decay"] == (0.05 if decays else 0.0)
    torch.optim.AdamW(groups)


# Published weights ---------------------------------------------------------------------------------------------------


def published(model):
    """The model's weights as the authors' tool names them: blocks twice."""
    weights = {name: torch.randn_like(value) for name, value in model.vit.state_dict().items()}
    length = len(model.vit.blocks) // model.strategy.groups
    for name, value in list(weights.items()):
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            weights[f"groups.{int(block) // length}.block_list.{int(block) % length}.{rest}"] = value.clone()
    for group, interpreter in enumerate(model.strategy.interpreters):
        for kind, value in interpreter.qk.state_dict().items():
            weights[f"groups.{group}.agent.qk.{kind}"] = torch.randn_like(value)
    return weights


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_published_weights_load(groups):
    model = small(tdm.IARED2(groups))
    weights = published(model)
    report = load_official(model, weights)
    assert report == tdm.checkpoints.LoadReport("ia-red2")
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, weights[name])
    for group, interpreter in enumerate(model.strategy.interpreters):
        assert torch.equal(interpreter.qk.weight, weights[f"groups.{group}.agent.qk.weight"])
        assert torch.equal(interpreter.qk.bias, weights[f"groups.{group}.agent.qk.bias"])


def test_published_weights_that_do_not_fit():
    model = small()
    weights = published(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="groups.1.block_list.1.norm1.weight"):
        load_official(model, {**weights, "groups.1.block_list.1.norm1.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"Not in the model: strategy.interpreters.2"):
        load_official(small(tdm.IARED2(groups=2)), weights)
    with pytest.raises(ValueError, match="attach that method before loading"):
        load_official(model.vit, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 0}, ValueError, "groups"),
        ({"groups": 1.5}, TypeError, "groups"),
        ({"threshold": 1.0}, ValueError, "threshold"),
        ({"threshold": -0.1}, ValueError, "threshold"),
        ({"threshold": "half"}, TypeError, "threshold"),
        ({"heads": 0}, ValueError, "heads"),
        ({"penalty": []}, ValueError, "penalty"),
        ({"penalty": 3.0}, TypeError, "penalty"),
        ({"penalty": [3, float("nan")]}, ValueError, "penalty"),
        ({"interpreter_epochs": 0}, ValueError, "interpreter_epochs"),
        ({"block_epochs": 0}, ValueError, "block_epochs"),
        ({"interpreter_lr": -1e-3}, ValueError, "interpreter_lr"),
        ({"merger": None}, TypeError, "merger"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.IARED2(**arguments)


@pytest.mark.parametrize(
    ("vit", "strategy", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, {}, "no class token|this model has none"),
        ({}, {"groups": 4}, "groups=4 does not divide the model's 6 blocks"),
        ({}, {"heads": 5}, "heads=5 does not divide the model's width 32"),
    ],
)
def test_models_that_do_not_fit(vit, strategy, message):
    with pytest.raises(ValueError, match=message):
        small(tdm.IARED2(**strategy), **vit)


def test_comes_back_from_plain_values():
    strategy = tdm.IARED2(2, 0.4, 4, [1.0, 2.0], 3, 4, 1e-3)
    again = tdm.Strategy.from_config(strategy.config())
    assert again.config() == strategy.config()
    assert again.config()["init_args"]["penalty"] == [1.0, 2.0]
