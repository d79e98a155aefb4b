"""What the attentive strategies refuse, and how they say it."""

import pytest
import timm

import tdm_lightning as tdm

STRATEGIES = (tdm.TDM, tdm.EViT)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("rate", "error"),
    [
        *(
            (rate, ValueError)
            for rate in (0, -0.1, 1.0001, 2, float("nan"), float("inf"), -float("inf"))
        ),
        *((rate, TypeError) for rate in ("0.7", True, None, [0.7], 0.5 + 0j)),
    ],
)
def test_keep_rate(strategy, rate, error):
    with pytest.raises(error, match=r"keep_rate must .* \(0, 1\], got"):
        strategy(keep_rate=rate)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ((3, 3), ValueError, "must not repeat"),
        ((-1,), ValueError, "cannot be negative"),
        ((1.0,), TypeError, "must hold integers"),
        ((True,), TypeError, "must hold integers"),
        (("3",), TypeError, "must hold integers"),
        ("3", TypeError, "must be a sequence"),
        (3, TypeError, "must be a sequence"),
        (None, TypeError, "must be a sequence"),
    ],
)
def test_layers(strategy, layers, error, message):
    with pytest.raises(error, match=message):
        strategy(layers=layers)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_that_the_model_lacks(strategy):
    with pytest.raises(
        ValueError, match=r"layers \[6, 9\] do not exist: the model has 6 blocks.*0…5"
    ):
        tdm.attach(timm.create_model("test_vit"), strategy(layers=(3, 6, 9)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("merger", ["TokenMerger", tdm.TokenMerger, 3])
def test_merger_of_another_kind(strategy, merger):
    with pytest.raises(TypeError, match="merger must be a Merger such as TokenMerger"):
        strategy(merger=merger)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("rate", "ratio"), [(0.3, 0.9), (0.4, 1.0)])
def test_a_split_that_is_not_feasible_is_refused_at_attach(strategy, rate, ratio):
    merger = tdm.TokenMerger(attentive_ratio=ratio, cluster_fraction=0.5)
    with pytest.raises(ValueError, match="no feasible split of 100 tokens.*attentive_ratio"):
        tdm.attach(
            timm.create_model("test_vit"), strategy(keep_rate=rate, layers=(1,), merger=merger)
        )


def test_unknown_argument():
    with pytest.raises(TypeError, match="keep_ratio"):
        tdm.TDM(keep_ratio=0.5)
