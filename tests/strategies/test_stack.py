"""Several strategies around one model."""

import json

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning import sparsity
from tdm_lightning.cli import main


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, num_classes=5, **changes)


def stack(*members):
    return tdm.attach(vit(), list(members))


@torch.no_grad()
def test_a_stack_reduces_as_its_member_does():
    x = torch.randn(2, 3, 64, 64)
    model, alone = (
        stack(tdm.SViTE(), tdm.TDM(0.5, (1, 3))).eval(),
        tdm.attach(vit(), tdm.TDM(0.5, (1, 3))).eval(),
    )
    assert type(model.strategy) is tdm.Stack
    torch.testing.assert_close(model(x), alone(x))
    (logits, trace), (_, expected) = model.trace(x), alone.trace(x)
    torch.testing.assert_close(logits, alone(x))
    assert trace.token_counts == expected.token_counts == [16, 8, 8, 4, 4, 4]
    assert all(
        torch.equal(a.assignment, b.assignment)
        for a, b in zip(trace.layers, expected.layers, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("members", [[], [tdm.SViTE()], [tdm.Strategy()]], ids=len)
def test_a_stack_that_reduces_nothing_is_the_plain_model(members):
    x, plain = torch.randn(2, 3, 64, 64), vit().eval()
    torch.testing.assert_close(tdm.attach(vit().eval(), members)(x), plain(x))


class Recording(tdm.Strategy, tdm.TrainingObjective):
    """Writes down what it is told."""

    keeps_tokens = True
    calls: list = []  # noqa: RUF012 - shared by all on purpose

    def __init__(self, name="a"):
        super().__init__()
        self.name = name

    def note(self, hook):
        Recording.calls.append(f"{hook} {self.name}")

    def bind(self, vit, info):
        self.note("bind")

    def begin(self, tokens):
        self.note("begin")
        return tokens

    def before_block(self, index, tokens):
        self.note(f"before {index}")
        return tokens

    def correct(self, index, tokens, observed):
        self.note(f"correct {index}")
        return observed

    def after_attention(self, index, tokens, seen):
        self.note(f"attention {index}")
        return tokens

    def after_block(self, index, tokens):
        self.note(f"after {index}")
        return tokens

    def finish(self, tokens):
        self.note("finish")
        return tokens

    def on_progress(self, epoch, step, total_steps):
        self.note(f"progress {epoch} {step} {total_steps}")

    def after_optimizer_step(self, model, step, total_steps):
        self.note(f"step {step} {total_steps}")

    def reset_classifier(self, num_classes):
        self.note(f"classes {num_classes}")

    def report(self, output, target):
        return {self.name: output.logits.mean()}


def test_every_hook_reaches_every_member_in_order():
    Recording.calls.clear()
    model = stack(Recording("a"), tdm.Stack([Recording("b"), Recording("c")]))
    assert len(model.strategy.members) == 3
    output = model.run(torch.randn(1, 3, 64, 64))
    model.objective.on_progress(1, 2, 3)
    model.objective.after_optimizer_step(model, 4, 5)
    model.reset_classifier(7)
    assert list(model.objective.report(output, torch.tensor([0]))) == ["a", "b", "c"]
    hooks = ["bind", "begin"]
    hooks += [
        f"{hook} {block}"
        for block in range(6)
        for hook in ("before", "correct", "attention", "after")
    ]
    hooks += ["finish", "progress 1 2 3", "step 4 5", "classes 7"]
    assert Recording.calls == [f"{hook} {name}" for hook in hooks for name in "abc"]


def test_a_stack_is_what_its_members_are():
    dyvit = tdm.DyViT(0.7, (1, 3), distill_weight=0, token_weight=0)
    model = stack(tdm.SViTE(), dyvit).train()
    alone = tdm.attach(vit(), tdm.DyViT(0.7, (1, 3), distill_weight=0, token_weight=0)).train()
    assert not model.strategy.keeps_tokens
    assert model.strategy.keep_rate == 0.7
    assert not hasattr(tdm.Stack([tdm.SViTE()]), "keep_rate")
    model.strategy.current_keep_rate = 0.9
    assert dyvit.current_keep_rate == model.strategy.current_keep_rate == 0.9
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    assert set(model.objective.loss(model.run(images), labels, F.cross_entropy)) == {
        "task",
        "ratio",
    }
    assert set(stack(tdm.SViTE()).objective.loss(model.run(images), labels, F.cross_entropy)) == {
        "task"
    }
    groups, expected = (each.objective.param_groups(each, 1e-3, 0.05) for each in (model, alone))
    assert [len(group["params"]) for group in groups] == [
        len(group["params"]) for group in expected
    ]
    assert tdm.Stack([tdm.SViTE(), tdm.DyViT()]).requires().teacher
    assert tdm.Stack([tdm.EvoViT()]).requires() == tdm.EvoViT().requires()
    assert tdm.Stack([tdm.SViTE(), tdm.ToMe(2)]).requires().sizes


def test_learned_layers_of_members_are_counted():
    report = tdm.flops.mac_report(stack(tdm.DyViT(0.7, (1, 3))))
    assert report == tdm.flops.mac_report(tdm.attach(vit(), tdm.DyViT(0.7, (1, 3))))
    assert report.learned > 0


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (
            [tdm.TDM(), tdm.EViT()],
            ValueError,
            "at most one strategy can reduce the tokens, got TDM, EViT",
        ),
        ([tdm.TDM(), tdm.Stack([tdm.ToMe()])], ValueError, "got TDM, ToMe"),
        ([tdm.TDM(), "EViT"], TypeError, "each member must be a Strategy"),
        ("TDM", TypeError, "or a list of some, got 'TDM'"),
        ([Recording()] * 2, ValueError, "the same strategy is there twice"),
    ],
)
def test_what_does_not_stack(members, error, message):
    with pytest.raises(error, match=message):
        tdm.attach(vit(), members)


def test_members_that_want_different_optimizers_or_poolings():
    class Groups(Recording):
        def requires(self):
            return tdm.Requirements(pooling="patches")

        def param_groups(self, model, lr, weight_decay):
            return [{"params": list(model.parameters())}]

    model = stack(Groups("a"), Groups("b"))
    with pytest.raises(ValueError, match="several members of a stack ask for optimizer groups"):
        model.objective.param_groups(model, 1e-3, 0.0)

    class Token(Recording):
        def requires(self):
            return tdm.Requirements(pooling="token")

    with pytest.raises(ValueError, match="pool in different ways"):
        tdm.Stack([Groups(), Token()])


def test_as_plain_values():
    masks = sparsity.Structured(0.5, 0.6)
    strategy = tdm.Stack(
        [tdm.SViTE(masks, interval=7), tdm.TDM(0.5, (1, 3), tdm.TokenMerger(density="knn"))]
    )
    config = strategy.config()
    assert json.loads(json.dumps(config)) == config
    again = tdm.Strategy.from_config(config)
    assert again.config() == config
    assert [type(member) for member in again.members] == [tdm.SViTE, tdm.TDM]
    assert isinstance(again.members[0].masks, sparsity.Structured)
    short = {
        "class_path": "Stack",
        "init_args": {"members": [{"class_path": "SViTE"}, {"class_path": "tdm_lightning.TDM"}]},
    }
    assert len(tdm.Strategy.from_config(short).members) == 2
    assert repr(strategy.members[0]).startswith("SViTE(")


def test_state_dict_and_own_checkpoints():
    members = lambda seed: (tdm.SViTE(seed=seed), tdm.TDM(0.5, (1, 3)))  # noqa: E731
    model, other = stack(*members(0)), stack(*members(1))
    sparsity.apply_masks(model)
    tdm.checkpoints.load_official(other, model.state_dict())
    assert all(
        torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items()
    )
    assert sparsity.extract_dense(other).blocks[0].attn.num_heads == int(
        0.7 * model.vit.blocks[0].attn.num_heads
    )


@pytest.mark.parametrize("stacked", ["file", "model", "both"])
def test_a_members_weights_load_in_and_out_of_a_stack(stacked):
    """PS-ViT's masks and DyViT's layers, whichever side has them in a stack."""
    for made in (
        lambda: tdm.PSViT(counts=(16, 9, 5, 3, 2, 0)),
        lambda: tdm.DyViT(0.5, (1, 3)),
    ):
        source = stack(tdm.SViTE(), made()) if stacked != "model" else tdm.attach(vit(), made())
        other = [tdm.PSViT(counts=(12, 8, 8, 8, 4, 0)) if isinstance(made(), tdm.PSViT) else made()]
        model = stack(tdm.SViTE(seed=1), *other) if stacked != "file" else tdm.attach(vit(), *other)
        weights = source.state_dict()
        if stacked == "file":  # masks of SViTE have no place here
            with pytest.raises(
                ValueError,
                match=r"Not in the model: strategy\.members\.0\.masks(?s:.*)attach that method",
            ):
                tdm.checkpoints.load_official(model, weights)
            weights = {name: value for name, value in weights.items() if ".masks." not in name}
        report = tdm.checkpoints.load_official(model, weights)
        assert bool(report.untouched) == (stacked == "model")
        assert all(name.startswith("strategy.members.0.masks.") for name in report.untouched)
        member, wanted = (
            getattr(each.strategy, "members", [each.strategy])[-1] for each in (model, source)
        )
        assert all(
            torch.equal(value, member.state_dict()[name])
            for name, value in wanted.state_dict().items()
        )
        if isinstance(member, tdm.PSViT):
            assert member.token_counts == (16, 9, 5, 3, 2, 0)


def test_masks_that_do_not_fit_a_member_are_refused():
    masks = {
        **tdm.attach(vit(), tdm.PSViT()).state_dict(),
        "strategy.kept": torch.ones(6, 9, dtype=torch.bool),
    }
    with pytest.raises(
        ValueError, match=r"Of another shape: strategy\.members\.1\.kept \(6×9 instead of 6×16\)"
    ):
        tdm.checkpoints.load_official(stack(tdm.SViTE(), tdm.PSViT()), masks)


def test_a_stack_trains_and_reduces(tmp_path):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 4}
    module = tdm.TokenReductionClassifier(
        "deit_tiny_patch16_224",
        [tdm.SViTE(interval=1), tdm.TDM(0.5, (1, 2))],
        5,
        model_kwargs=settings,
        warmup_epochs=0,
    )
    before = {
        name: value.clone()
        for name, value in module.model.strategy.members[0].masks.named_buffers()
    }
    data = DataLoader(TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 5), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, data, data)
    masks = module.model.strategy.members[0].masks
    assert all(
        not torch.equal(value, before[name])
        for name, value in masks.named_buffers()
        if name.startswith("units")
    )
    assert masks.enforced(module.model.vit)
    x = torch.randn(2, 3, 32, 32)
    assert module.model.trace(x)[1].token_counts == [16, 8, 4, 4]
    trainer.save_checkpoint(tmp_path / "stack.ckpt")
    again = tdm.TokenReductionClassifier.load_from_checkpoint(tmp_path / "stack.ckpt").eval()
    module.eval()
    torch.testing.assert_close(again(x), module(x))
    dense = tdm.attach(sparsity.extract_dense(again.model), tdm.TDM(0.5, (1, 2))).eval()
    torch.testing.assert_close(dense(x), module(x), atol=1e-5, rtol=1e-5)


TINY = [
    "--config=quickstart",
    "--trainer.fast_dev_run=1",
    "--trainer.enable_progress_bar=false",
    "--model.model_kwargs={img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 24, num_heads: 3}",
    "--model.warmup_epochs=0",
    "--data.batch_size=4",
]


@pytest.mark.parametrize(
    "strategy",
    [
        ["--config=strategies/svite_tdm"],
        ["--model.strategy=[{class_path: SViTE, init_args: {interval: 50}}, {class_path: TDM}]"],
        [
            "--model.strategy=null",
            "--model.strategy=Stack",
            "--model.strategy.members=[{class_path: SViTE}, {class_path: TDM}]",
        ],
    ],
    ids=["config", "list", "stack"],
)
def test_through_the_command_line(tmp_path, monkeypatch, strategy):
    monkeypatch.chdir(tmp_path)
    cli = main(["fit", *TINY, *strategy])
    stacked = cli.model.model.strategy
    assert [type(member) for member in stacked.members] == [tdm.SViTE, tdm.TDM]
    assert cli.model.hparams["strategy"] == stacked.config()
