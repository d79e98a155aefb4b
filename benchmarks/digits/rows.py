"""The methods on digits, each with the options of its ``tdm fit``."""

from __future__ import annotations

from dataclasses import dataclass

#: Stands for the checkpoint of the plain run.
PLAIN = "{plain}"


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        name: of the method.
        fit: options behind ``tdm fit --config quickstart``.
        test: further options of ``tdm test``.
        tests_weights: test the weights of the run under another setting of the method, and not its
            checkpoint.
    """

    name: str
    fit: tuple[str, ...]
    test: tuple[str, ...] = ()
    tests_weights: bool = False


def _row(name: str, *fit: str, test: tuple[str, ...] = (), tests_weights: bool = False) -> Row:
    config = f"strategies/{name}"
    return Row(name, ("--config", config, *fit), ("--config", config, *test), tests_weights)


_S, _T, _M = "--model.strategy.init_args", "--trainer", "--model"
_START = f"{_M}.weights={PLAIN}"

ROWS = (
    _row("plain"),
    _row("tdm"),
    _row("evit"),
    _row("evit_tdm"),
    _row("dyvit", _START),
    _row("dyvit_tdm", _START),
    _row("evovit", f"{_S}.layerwise_epochs=30"),
    _row("evovit_tdm", f"{_S}.layerwise_epochs=30"),
    _row("tome", f"{_S}.r=1", test=(f"{_S}.r=1",)),
    _row("dpcknn"),
    _row("topk"),
    _row("random"),
    _row(
        "avit",
        _START,
        f"{_M}.lr=5e-4",
        f"{_M}.warmup_epochs=1",
        f"{_S}.gate_center=10",
        f"{_S}.ponder_weight=0.005",
        f"{_T}.max_epochs=15",
        test=(f"{_S}.gate_center=10",),
    ),
    _row(
        "spvit",
        _START,
        f"{_M}.warmup_epochs=1",
        f"{_T}.max_epochs=14",
        f"{_T}.check_val_every_n_epoch=14",
        f"{_S}.backbone_lr_scale=0.1",
        f"{_S}.freeze_epochs=1",
        f"{_S}.ratio_weight=20",
        test=(f"{_S}.fixed_count=true",),
        tests_weights=True,
    ),
    _row(
        "iared2",
        _START,
        f"{_T}.check_val_every_n_epoch=45",
        f"{_M}.train_in_eval_mode=true",
        f"{_M}.mixup=0",
        f"{_M}.warmup_epochs=0",
        f"{_M}.lr=5e-4",
        f"{_M}.min_lr=5e-4",
        f"{_S}.interpreter_lr=2e-3",
        f"{_S}.interpreter_epochs=5",
        f"{_S}.block_epochs=10",
    ),
    _row("svite", f"{_S}.interval=100"),
)
