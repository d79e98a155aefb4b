"""Patch slimming: impact scores, the search on a trained model, and ``tdm slim``."""

import copy
import csv
import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning import slimming
from tdm_lightning.cli import main
from tdm_lightning.slimming.error import relative_error
from tdm_lightning.vit.adapters.parts import ATTENTIONS
from tdm_lightning.vit.find import hook_blocks

SHAPE = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 32,
    "depth": 6,
    "num_heads": 2,
    "num_classes": 10,
}
NAME = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def digits():
    """Batches of training images, B×1×8×8, and labels."""
    data = tdm.ImageNetDataModule(
        "digits",
        model=NAME,
        model_kwargs=SHAPE,
        augment=False,
        crop_pct=1.0,
        batch_size=64,
        num_workers=0,
        pin_memory=False,
    )
    data.setup("fit")
    torch.manual_seed(0)
    return [batch for batch, _ in zip(data.train_dataloader(), range(10), strict=False)]


@pytest.fixture(scope="module")
def trained(digits):
    """A small ViT that tells most digits apart."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, **SHAPE)
    optimizer = torch.optim.AdamW(vit.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(14):
        for images, labels in digits:
            optimizer.zero_grad()
            loss = F.cross_entropy(vit(images), labels)
            loss.backward()
            optimizer.step()
    vit.eval()
    with torch.no_grad():
        right = (
            torch.cat([vit(images).argmax(1) == labels for images, labels in digits]).float().mean()
        )
    assert right > 0.6  # chance is 0.1
    return vit


def features(model, images):
    """The tokens after each block."""
    seen = []
    with torch.no_grad(), hook_blocks(model, lambda index, x, valid: seen.append(x)):
        model(images)
    return seen


def independent_error(vit, masks, index, images, reference=None):
    """What blocks up to ``index + 1`` give with the masks from ``index`` on, against none, in whole
    passes of the model.
    """
    patches, prefix = masks.shape[1], vit.num_prefix_tokens
    upto = masks.clone()
    upto[:index] = True
    upto[index + 2 :] = False
    model = tdm.attach(copy.deepcopy(vit), tdm.PSViT(masks=upto))
    off = size = 0.0
    for batch in images:
        kept = upto[index + 1]
        found = features(model, batch)[index + 1]
        assert found.shape[1] == prefix + kept.sum()
        # The reduced model sorts its patches by how many blocks compute them.
        place = (
            upto.sum(0)
            .mul(patches)
            .sub(torch.arange(patches))
            .argsort(descending=True)[: int(kept.sum())]
        )
        assert torch.equal(place.sort().values, kept.nonzero().flatten())
        full = features(reference or vit, batch)[index + 1]
        wanted = torch.cat((full[:, :prefix], full[:, prefix:][:, place]), dim=1)
        off += (found - wanted).square().sum().item()
        size += wanted.square().sum().item()
    return math.sqrt(off / size)


# Impact ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_maps_are_timms():
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, qk_norm=True
    )
    attn, x = vit.blocks[0].attn, torch.randn(2, 17, 32)
    maps, original = [], attn.attn_drop.forward
    attn.fused_attn, attn.attn_drop.forward = (
        False,
        lambda weights: maps.append(weights) or original(weights),
    )
    attn(x)
    heads = ATTENTIONS[type(attn)].heads(attn, x, None, 0)
    found = slimming.attention_maps(heads.q, heads.k, heads.scale)
    torch.testing.assert_close(found, maps[0], atol=1e-6, rtol=1e-5)


def test_impact_against_matrices_spelled_out():
    """``Ã = Π diag(m)·½(P̄+I)`` from the last block down,
    ``‖Ã[:,i]‖²·‖(P̄|Z|)[i,:]‖²``; four blocks, five tokens.
    """
    torch.manual_seed(1)
    attention = [torch.rand(1, 3, 5, 5).softmax(-1) for _ in range(4)]
    z = torch.randn(1, 5, 7)
    masks = torch.tensor(
        [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool
    )
    mean = [a[0].mean(0) for a in attention]
    product = torch.eye(5)
    for block in (3, 2):
        product = product @ torch.diag(masks[block].float()) @ (0.5 * (mean[block] + torch.eye(5)))
    update = mean[1] @ z[0].abs()
    expected = [product[:, i].square().sum() * update[i].square().sum() for i in range(5)]

    influence = torch.eye(5)[None]
    for block in (3, 2):
        influence = slimming.influence_through(influence, masks[block], attention[block])
    found = slimming.impact_scores(influence, attention[1], z)
    torch.testing.assert_close(found[0], torch.stack(expected))
    # The last block keeps the class token alone: its row says it all.
    row = torch.eye(5)[None, :1]
    for block in (3, 2):
        row = slimming.influence_through(row, masks[block], attention[block])
    torch.testing.assert_close(slimming.impact_scores(row, attention[1], z), found)


# The search on a trained model ----------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_the_search_meets_its_bound(trained, digits, bound):
    images = [batch for batch, _ in digits[:2]]
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    seen = []
    found = slimming.search(trained, digits, bound, step=1, images=128, done=seen.append)
    masks = found.masks
    counts = [block.patches for block in found.blocks]
    assert counts == masks.sum(1).tolist() == list(found.model.strategy.token_counts)
    assert counts[-1] == 0
    assert 0 < sum(counts) < 5 * 16
    assert (masks[:-1] | ~masks[1:]).all()
    assert [block.index for block in seen] == [4, 3, 2, 1, 0]
    for index in range(5):
        error = independent_error(trained, masks, index, images)
        assert error == pytest.approx(found.blocks[index].error, rel=1e-3, abs=1e-6)
        assert error <= bound
    # The last choice of each block was needed: with the patches of the block behind alone the bound
    # is not met.
    for index in range(5):
        if counts[index] > counts[index + 1]:
            fewer = masks.clone()
            fewer[: index + 1] = masks[index + 1]
            fewer[:index] = True
            assert independent_error(trained, fewer, index, images) > bound
    with torch.no_grad():
        ends = [
            (found.model.forward_features(batch)[:, 0], trained.forward_features(batch)[:, 0])
            for batch in images
        ]
    assert found.error == pytest.approx(relative_error(*zip(*ends, strict=True)), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_a_wider_bound_keeps_fewer_patches(trained, digits):
    patches = [
        int(slimming.search(trained, digits, bound, step=1, images=64).masks.sum())
        for bound in (0.0, 0.02, 0.1, 10.0)
    ]
    assert patches == sorted(patches, reverse=True)
    assert patches[0] == 5 * 16  # nothing but the last block
    assert patches[-1] == 0


def test_impact_chooses_better_than_its_opposite_and_than_spreading(trained, digits):
    """At the same counts, the class token's final feature stays closest with the patches of
    greatest impact.
    """
    counts = [8, 8, 8, 8, 8, 0]
    best = slimming.select(trained, digits, counts, images=256)
    assert best.masks.sum(1).tolist() == counts
    worst = tdm.PSViT(masks=torch.cat((~best.masks[:5], best.masks[5:])))

    def class_error(strategy):
        model = tdm.attach(trained, strategy)
        images = [batch for batch, _ in digits[:4]]
        with torch.no_grad():
            found = [model.forward_features(batch)[:, 0] for batch in images]
            return relative_error(
                found, [trained.forward_features(batch)[:, 0] for batch in images]
            )

    assert best.error == pytest.approx(class_error(tdm.PSViT(masks=best.masks)), rel=1e-3)
    assert best.error < class_error(tdm.PSViT(counts=counts)) < class_error(worst)


def test_counts_choose_nested_patches_of_greatest_impact(trained, digits):
    counts = [16, 11, 7, 7, 3, 0]
    found = slimming.select(trained, digits, counts, images=64)
    assert [block.patches for block in found.blocks] == counts
    assert (found.masks[:-1] | ~found.masks[1:]).all()
    images = [digits[0][0]]
    for index in range(5):
        assert independent_error(trained, found.masks, index, images) == pytest.approx(
            found.blocks[index].error, rel=1e-3, abs=1e-6
        )


def test_fine_tuning_needs_fewer_patches(trained, digits):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    plain = slimming.search(trained, digits, 0.1, step=2, images=128)
    tuned = slimming.search(trained, digits, 0.1, step=2, images=128, epochs=10, lr=1e-3)
    assert not any(block.tuned for block in plain.blocks)
    assert any(block.tuned for block in tuned.blocks)
    assert tuned.masks.sum() < plain.masks.sum()
    assert all(block.error <= 0.1 for block in tuned.blocks)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    changed = [
        index
        for index, (block, other) in enumerate(
            zip(tuned.model.vit.blocks, trained.blocks, strict=True)
        )
        if not torch.equal(block.mlp.fc1.weight, other.mlp.fc1.weight)
    ]
    assert changed == [block.index for block in tuned.blocks if block.tuned]
    # The block that was tuned first: all behind it is the original model.
    index = max(changed)
    mixed = copy.deepcopy(trained)
    mixed.blocks[index].load_state_dict(tuned.model.vit.blocks[index].state_dict())
    error = independent_error(
        mixed, tuned.masks, index, [batch for batch, _ in digits[:2]], reference=trained
    )
    assert error == pytest.approx(tuned.blocks[index].error, rel=1e-3)


def test_two_class_tokens_and_registers(digits):
    from timm.models.deit import VisionTransformerDistilled

    images = [batch for batch, _ in digits[:1]]
    for vit in (VisionTransformerDistilled(**SHAPE), VisionTransformer(**SHAPE, reg_tokens=2)):
        found = slimming.search(vit, images, 0.1, step=4)
        assert found.model.strategy.token_counts[-1] == 0
        assert all(block.error <= 0.1 for block in found.blocks)


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bound": -0.1}, ValueError, "below that no masks can meet it"),
        ({"bound": math.nan}, ValueError, "relative error of at least 0"),
        ({"bound": "0.1"}, TypeError, "bound must be a number"),
        ({"step": 0}, ValueError, "step must be at least 1"),
        ({"images": 0}, ValueError, "images must be at least 1"),
        ({"epochs": -1}, ValueError, "epochs"),
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"loader": []}, ValueError, "needs images, and the loader has none"),
        ({"loader": [torch.zeros(3)]}, TypeError, "batches of images.*shape \\(3,\\)"),
        ({"loader": [{"image": 1}]}, TypeError, "the loader gave a dict"),
        ({"loader": [torch.zeros(1, 3, 8, 8)]}, ValueError, "B×1×H×W"),
        ({"loader": [torch.full((1, 1, 8, 8), math.nan)]}, ValueError, "NaN"),
    ],
)
def test_bad_input(settings, error, message):
    vit = timm.create_model(NAME, **SHAPE)
    with pytest.raises(error, match=message):
        slimming.search(vit, **{"loader": [torch.zeros(2, 1, 8, 8)], **settings})


def test_models_that_cannot_be_slimmed():
    loader = [torch.zeros(2, 1, 8, 8)]
    with pytest.raises(ValueError, match="classifies by its class token"):
        slimming.search(VisionTransformer(**SHAPE, global_pool="avg"), loader)
    with pytest.raises(ValueError, match="reduced already"):
        slimming.search(tdm.attach(VisionTransformer(**SHAPE), tdm.TDM(layers=(1,))), loader)
    with pytest.raises(TypeError, match="cannot reduce"):
        slimming.search(timm.create_model("test_resnet"), loader)
    for counts, message in (
        ([16] * 6, "end with 0"),
        ([16, 0], "one number per block"),
        ([1, 2, 0], "must not grow"),
    ):
        with pytest.raises(ValueError, match=message):
            slimming.select(VisionTransformer(**SHAPE), loader, counts)


# The command ----------------------------------------------------------------------------------

DATA = [
    "--data.dataset=digits",
    "--data.crop_pct=1.0",
    "--data.num_workers=0",
    "--data.batch_size=64",
]


@pytest.fixture
def command(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": trained.state_dict()}, "vit.pth")

    def call(*extra):
        model = [
            f"--model={NAME}",
            f"--model_kwargs={SHAPE}",
            "--weights=vit.pth",
            "--device=cpu",
            "--images=64",
        ]
        return main(["slim", *model, *extra])

    return call


def test_command_writes_what_fit_and_test_take(command, trained, capsys, tmp_path):
    found = command(*DATA, "--bound=0.1", "--step=2", "--out=made/here")
    printed = capsys.readouterr().out
    assert "slim.safetensors" in printed
    with open("made/here/slim.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["patches"]) for row in rows[:-1]] == [block.patches for block in found.blocks]
    assert all(float(row["error"]) <= 0.1 for row in rows[:-1])
    assert float(rows[-1]["GMACs"]) == pytest.approx(
        tdm.flops.count_macs(found.model) / 1e9, rel=1e-3
    )
    assert float(rows[-1]["plain GMACs"]) == pytest.approx(
        tdm.flops.count_macs(trained) / 1e9, rel=1e-3
    )

    layer = tmp_path / "layer.yaml"
    kwargs = {key: value for key, value in SHAPE.items() if key != "num_classes"}
    layer.write_text(
        f"model: {{model: {NAME}, model_kwargs: {kwargs}, checkpoint: made/here/slim.safetensors,"
        " warmup_epochs: 0}"
    )
    arguments = [
        *DATA,
        "--trainer.accelerator=cpu",
        "--trainer.fast_dev_run=1",
        "--trainer.enable_progress_bar=false",
    ]
    for name in ("test", "fit"):
        cli = main([name, "--config", "strategies/psvit", "--config", str(layer), *arguments])
        assert torch.equal(cli.model.model.strategy.kept, found.masks)
        assert cli.model.model.strategy.token_counts == found.model.strategy.token_counts


def test_command_with_a_checkpoint_of_fit(trained, tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.chdir(tmp_path)
    module = tdm.TokenReductionClassifier(NAME, tdm.TDM(layers=(1,)), model_kwargs=SHAPE)
    module.model.vit.load_state_dict(trained.state_dict())
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("run.ckpt")
    found = main(
        [
            "slim",
            "--weights=run.ckpt",
            *DATA,
            "--counts=[8, 8, 6, 4, 4, 0]",
            "--device=cpu",
            "--images=64",
        ]
    )
    assert [block.patches for block in found.blocks] == [8, 8, 6, 4, 4, 0]
    assert all(
        torch.equal(value, trained.state_dict()[name])
        for name, value in found.model.vit.state_dict().items()
    )
    assert (tmp_path / "slim/slim.safetensors").exists()


def test_command_for_a_budget(command, trained):
    budget = 0.7 * tdm.flops.count_macs(trained)
    found = command(*DATA, f"--match-gmacs={budget / 1e9}")
    assert 0.6 * budget < tdm.flops.count_macs(found.model) <= budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=vit.pth"], "a search needs images: give --data"),
        (DATA, "untrained"),
        (["--weights=vit.pth", *DATA, "--bound=-1"], "bound"),
        (["--weights=vit.pth", *DATA, "--counts=[1, 0]", "--match_gmacs=1"], "give one of them"),
        (["--weights=vit.pth", *DATA, "--counts=[1, 0]"], "one number per block"),
        (["--weights=vit.pth", *DATA, "--device=tpu9"], "device"),
        (
            [
                "--weights=vit.pth",
                *DATA,
                "--model_kwargs.global_pool=avg",
                "--model_kwargs.fc_norm=false",
            ],
            "class token",
        ),
    ],
)
def test_command_says_what_is_wrong(command, arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["slim", f"--model={NAME}", f"--model_kwargs={SHAPE}", *arguments])
