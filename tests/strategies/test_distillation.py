"""Distillation from the unreduced model."""

import pytest
import timm
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import Output
from tests.helpers.vits import lively


def small():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 4}
    vit = lively(timm.create_model("deit_tiny_patch16_224", num_classes=5, **shape))
    torch.nn.init.normal_(vit.head.weight)
    return vit


def test_the_loss_is_the_divergence_from_the_teachers_answers():
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    strategy = [tdm.Distillation(2.0, temperature=3.0), tdm.WardTDM(0.5, (1, 2))]
    model = tdm.attach(small(), strategy).train()
    teacher = tdm.attach(small().eval(), tdm.Strategy()).run(images)
    output = model.run(images)
    terms = model.objective.loss(output, labels, F.cross_entropy, teacher)
    assert set(terms) == {"task", "distillation"}
    torch.testing.assert_close(terms["task"], F.cross_entropy(output.logits, labels))
    wanted, found = ((o.logits / 3).softmax(1) for o in (teacher, output))
    expected = 2 * 9 * (wanted * (wanted.log() - found.log())).sum(1).mean()
    torch.testing.assert_close(terms["distillation"], expected)
    assert terms["distillation"] > 0
    terms["distillation"].backward()
    assert model.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_beside_a_method_it_changes_no_answer():
    images = torch.randn(2, 3, 32, 32)
    alone = tdm.attach(small().eval(), tdm.WardTDM(0.5, (1, 2)))(images)
    beside = tdm.attach(small().eval(), [tdm.Distillation(), tdm.WardTDM(0.5, (1, 2))])(images)
    assert torch.equal(alone, beside)


def test_an_equal_teacher_costs_nothing():
    output = Output(torch.randn(2, 5), torch.zeros(2, 1, 4), None, None, None)
    terms = tdm.Distillation().loss(output, torch.tensor([0, 1]), F.cross_entropy, output)
    assert terms["distillation"].abs() < 1e-6


def test_fit_learns_from_the_starting_weights(tmp_path):
    from lightning.pytorch import Trainer

    torch.save({"model": small().state_dict()}, tmp_path / "vit.pth")
    module = tdm.TokenReductionClassifier(
        "deit_tiny_patch16_224",
        [tdm.Distillation(), tdm.TDM(0.5, layers=(1, 2))],
        num_classes=5,
        weights=str(tmp_path / "vit.pth"),
        model_kwargs={
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "num_heads": 2,
            "depth": 4,
        },
        warmup_epochs=0,
        mixup=0.0,
        cutmix=0.0,
    )
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    trainer = Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert trainer.global_step == 2
    again = tdm.Strategy.from_config(module.model.strategy.config())
    assert again.config() == module.model.strategy.config()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tdm.Distillation(0), "weight"),
        (lambda: tdm.Distillation(temperature=-1), "temperature"),
        (
            lambda: tdm.Distillation().loss(
                Output(torch.zeros(1, 2), torch.zeros(1), None, None, None),
                torch.tensor([0]),
                F.cross_entropy,
            ),
            "there is none",
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
