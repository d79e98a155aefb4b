"""Costs in a foreign run, for the batches' own image size."""

import pytest
import torch
from tdm_lightning.callbacks import FLOPsMonitor, KeepRateWarmup

import tdm_lightning as tdm
from tdm_lightning.core import Reduction
from tdm_lightning.flops import count_macs, mac_report
from tdm_lightning.ops import gather_tokens, rank_order
from tdm_lightning.strategies.base import Strategy
from tests.callbacks.foreign import Foreign, loader, small_vit, trainer


def costs(tmp_path, encoder, size=32, form="tuple", *callbacks):
    monitor = FLOPsMonitor()
    run = trainer(tmp_path, monitor, *callbacks)
    run.test(Foreign(encoder), loader(form=form, size=size), verbose=False)
    assert {name: value.item() for name, value in run.callback_metrics.items()} == pytest.approx(
        monitor.costs
    )
    return monitor.costs


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_reduced_and_plain(tmp_path, form, capsys):
    vit = small_vit()
    model = tdm.attach(vit, tdm.TDM(0.7, layers=(1, 2)))
    reduced, plain = costs(tmp_path, model, form=form), costs(tmp_path, vit, form=form)
    assert plain["flops/gmacs"] * 1e9 == pytest.approx(count_macs(vit))
    assert reduced["flops/gmacs"] * 1e9 == pytest.approx(count_macs(model))
    assert plain["flops/reduction"] == 0
    assert reduced["flops/reduction"] == pytest.approx(1 - count_macs(model) / count_macs(vit))
    assert [reduced[f"tokens/block_0{block}"] for block in range(4)] == [16, 12, 9, 9]
    assert [plain[f"tokens/block_0{block}"] for block in range(4)] == [16] * 4
    printed = capsys.readouterr().out
    assert printed.count("patch tokens after each block: 16 12 9 9\n") == 1
    assert printed.count("patch tokens after each block: 16 16 16 16\n") == 1


def test_follows_the_batches_size(tmp_path):
    vit = small_vit(dynamic_img_size=True)
    model = tdm.attach(vit, tdm.TDM(0.5, layers=(1,)))
    found = costs(tmp_path, model, size=48)
    assert found["tokens/block_00"] == 36
    assert found["flops/gmacs"] * 1e9 == pytest.approx(mac_report(model, (3, 48, 48)).backbone)
    assert costs(tmp_path, vit, size=48)["tokens/block_03"] == 36


def test_logs_every_epoch_while_the_keep_rate_warms_up(tmp_path, capsys):
    # Listed before the warm-up, to see that the order does not matter.
    run = trainer(tmp_path, FLOPsMonitor(), KeepRateWarmup(1, 2), max_epochs=4)
    run.fit(Foreign(tdm.attach(small_vit(), tdm.TDM(0.5, layers=(1,)))), loader(), loader())
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("tokens/block_03")
    assert [float(line.split(",")[column]) for line in lines[1:]] == [16, 16, 12, 8]
    assert capsys.readouterr().out.count("at the current keep rate 1,") == 1


class Half(Strategy):
    """Keeps the patches above the mean attention, as many as the neediest image of the batch
    has.
    """

    adaptive = True

    def needs(self, index, info):
        return frozenset({"importance"}) if index == 1 else frozenset()

    def after_attention(self, index, tokens, seen):
        if index != 1:
            return tokens
        score = seen.importance
        keep = int((score > score.mean(1, keepdim=True)).sum(1).max())
        order = rank_order(score)
        assignment = torch.full_like(order, -1).scatter(
            1, order[:, :keep], torch.arange(keep).expand(len(score), -1)
        )
        return tokens.reduced(
            1,
            Reduction(gather_tokens(tokens.patches, order[:, :keep]), assignment, assignment),
            score,
        )


def test_adaptive_strategies_are_counted_on_images(tmp_path, capsys):
    model = tdm.attach(small_vit(), Half()).eval()
    found = costs(tmp_path, model)
    reports = [mac_report(model, images=images) for _, images in loader()]
    assert found["flops/gmacs"] * 1e9 == pytest.approx(
        sum(report.backbone for report in reports) / 3
    )
    assert found["tokens/block_03"] == pytest.approx(
        sum(report.blocks[3].tokens for report in reports) / 3
    )
    assert 0 < found["flops/reduction"] < 0.5
    assert capsys.readouterr().out.count("GMACs per image") == 1


def test_half_precision_weights(tmp_path):
    monitor = FLOPsMonitor()
    model = tdm.attach(small_vit(), tdm.TDM(0.5, layers=(1,)))
    exact = count_macs(model)
    trainer(tmp_path, monitor, precision="bf16-true").test(Foreign(model), loader(), verbose=False)
    assert monitor.costs["flops/gmacs"] * 1e9 == pytest.approx(exact)


def test_a_batch_without_images(tmp_path):
    class Blind(Foreign):
        def test_step(self, batch, batch_idx):
            pass

    data = torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2)
    with pytest.raises(ValueError, match="no images"):
        trainer(tmp_path, FLOPsMonitor()).test(Blind(small_vit()), data)


def test_wrong_settings():
    with pytest.raises(ValueError, match="at least 1"):
        FLOPsMonitor(max_batches=0)


class Some(Strategy):
    """Each image keeps its patches above the mean of the batch."""

    adaptive = True

    def before_block(self, index, tokens):
        norm = tokens.patches.norm(dim=-1)
        return tokens.packed(index, norm > norm.mean()) if index == 1 else tokens


def test_spread_over_images(tmp_path, capsys):
    model = tdm.attach(small_vit(), Some())
    found = costs(tmp_path, model)
    assert found["flops/gmacs_alone_std"] > 0
    assert found["flops/gmacs_alone"] < found["flops/gmacs"]  # a batch pays for its padding
    assert found["tokens/block_00_std"] == 0
    assert found["tokens/block_03_std"] > 0
    assert "one by one the images take" in capsys.readouterr().out
