"""Strategies as plain values."""

import json

import pytest

import tdm_lightning as tdm
from tdm_lightning.core.configurable import Configurable, stored_name

MERGER = tdm.TokenMerger(density="knn", neighbours=3, attentive_ratio=0.6)


@pytest.mark.parametrize(
    "strategy",
    [
        tdm.TDM(),
        tdm.TDM(0.5, (1, 4), MERGER),
        tdm.EViT(0.6, [2], fuse=False),
        tdm.EViT(merger=MERGER),
    ],
    ids=str,
)
def test_config_is_plain_and_builds_the_same_again(strategy):
    config = strategy.config()
    assert json.loads(json.dumps(config)) == config
    again = tdm.Strategy.from_config(config)
    assert type(again) is type(strategy)
    assert again.config() == config
    assert again is not strategy


def test_config_is_of_the_settings_alone():
    strategy = tdm.TDM(0.5)
    strategy.current_keep_rate = 0.9
    assert tdm.Strategy.from_config(strategy.config()).current_keep_rate is None
    assert strategy.config()["class_path"] == "tdm_lightning.TDM"


@pytest.mark.parametrize("path", ["TDM", "tdm_lightning.TDM", "tdm_lightning.strategies.tdm.TDM"])
def test_short_class_paths(path):
    built = tdm.Strategy.from_config(
        {
            "class_path": path,
            "init_args": {"keep_rate": 0.4, "merger": {"class_path": "TokenMerger"}},
        }
    )
    assert isinstance(built, tdm.TDM)
    assert built.keep_rate == 0.4
    assert isinstance(built.merger, tdm.TokenMerger)


def test_arguments_are_optional():
    assert tdm.Strategy.from_config({"class_path": "EViT"}).config() == tdm.EViT().config()
    assert (
        tdm.Strategy.from_config({"class_path": "EViT", "init_args": None}).config()
        == tdm.EViT().config()
    )


@pytest.mark.parametrize("path", ["os.system", "Nonexistent", "torch.nn.Linear", "TokenMerger"])
def test_only_known_strategies_are_built(path):
    with pytest.raises(ValueError, match=r"is not a known Strategy; known are .*EViT.*TDM"):
        tdm.Strategy.from_config({"class_path": path, "init_args": {}})


def test_unknown_and_bad_arguments():
    with pytest.raises(TypeError, match="keep_ratio"):
        tdm.Strategy.from_config({"class_path": "TDM", "init_args": {"keep_ratio": 0.5}})
    with pytest.raises(ValueError, match="keep_rate"):
        tdm.Strategy.from_config({"class_path": "TDM", "init_args": {"keep_rate": 0}})


def test_printed_form_names_every_setting():
    assert repr(tdm.EViT(0.5)) == "EViT(keep_rate=0.5, layers=[3, 6, 9], fuse=True, merger=None)"
    assert "merger=TokenMerger(cluster_fraction=0.25" in repr(tdm.TDM())


def test_a_users_own_strategy_joins():
    class Mine(tdm.TDM):
        def __init__(self, keep_rate: float = 0.7, colour: str = "red") -> None:
            super().__init__(keep_rate)
            self.colour = colour

    built = tdm.Strategy.from_config(Mine(colour="blue").config())
    assert isinstance(built, Mine)
    assert built.colour == "blue"


def test_every_class_of_the_library_is_stored_under_a_public_name():
    own = [
        cls for cls in Configurable.known().values() if cls.__module__.startswith("tdm_lightning")
    ]
    assert len(own) > 15
    for cls in own:
        if cls.__name__ in tdm.__all__:
            assert getattr(tdm, cls.__name__) is cls
            assert stored_name(cls) == f"tdm_lightning.{cls.__name__}"


def test_a_users_class_is_stored_by_its_import_path():
    class Own(tdm.Strategy):
        pass

    assert Own().config()["class_path"] == f"{__name__}.{Own.__qualname__}"
    assert type(tdm.Strategy.from_config(Own().config())) is Own


def test_a_short_name_of_two_classes_is_refused_with_both_paths():
    class TDM(tdm.Strategy):
        pass

    try:
        path = f"{__name__}.{TDM.__qualname__}"
        with pytest.raises(ValueError, match="2 classes") as error:
            tdm.Strategy.from_config({"class_path": "TDM"})
        assert path in str(error.value)
        assert "tdm_lightning.strategies.tdm.TDM" in str(error.value)
        assert type(tdm.Strategy.from_config({"class_path": "tdm_lightning.TDM"})) is tdm.TDM
        assert type(tdm.Strategy.from_config({"class_path": path})) is TDM
    finally:  # others look classes up by their short names too
        Configurable._registry.pop(path)
