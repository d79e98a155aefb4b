"""Bad inputs: each ends with code 2 and one line that says what was wrong; bugs keep tracebacks."""

import logging
import re
import shlex
import sys

import datasets
import pytest
import torch

import tdm_lightning as tdm
from tdm_lightning.cli import entry, main
from tests.helpers.localsets import make_image_folder

#: A short run, where there is one at all.
BRIEF = (
    "--config quickstart --trainer.fast_dev_run=1 --trainer.logger=false --trainer.callbacks=null"
    " --trainer.enable_progress_bar=false --trainer.enable_model_summary=false"
)

FILES = {
    "twice.yaml": "model:\n  lr: 0.1\n  min_lr: 0.01\n  lr: 0.2\n",
    "list.yaml": "model:\n- lr\n- 3\n",
    "items.yaml": "- model\n- data\n",
    "word.yaml": "model",
    "syntax.yaml": "model: [1, 2\ndata: {\n",
    "key.yaml": "model:\n  keep_raet: 0.5\n",
    "section.yaml": "modle:\n  lr: 0.5\n",
    "argument.yaml": "model:\n  strategy: {class_path: TDM, init_args: {keep_raet: 0.5}}\n",
    "rate.yaml": "model:\n  strategy: {class_path: TDM, init_args: {keep_rate: 0}}\n",
    "text.ckpt": "no checkpoint",
    "empty.ckpt": "",
    "no.png": "no image",
}

#: Told before anything is imported.
AT_ONCE = [
    ("frobnicate", "unknown command 'frobnicate'; the commands are fit, .*visualize$"),
    ("vizualize", "unknown command 'vizualize'; did you mean visualize\\?$"),
    ("FIT", "unknown command 'FIT'; did you mean fit"),
    ("--nonsense", "unknown command '--nonsense'"),
    ("fit --modle.lr=3", "no setting --modle.lr; did you mean --model.lr"),
    ("fit --model.lrr=3", "no setting --model.lrr; did you mean --model.lr"),
    ("fit --model.nonsense=1", "no setting --model.nonsense; `--help` behind the command"),
    ("fit --data.batchsize 3", "no setting --data.batchsize; did you mean --data.batch_size"),
    ("fit --trainer.max_epohcs=3", "did you mean --trainer.max_epochs"),
    ("test --ckpt=a.ckpt", "--ckpt is --weights now"),
    ("test --ckpt_pth=a.ckpt", "did you mean --ckpt_path"),
    ("fit --model.pretrained=true", "--model.pretrained is --model.weights true now"),
    ("export --modle=test_vit", "no setting --modle; did you mean --model"),
    ("compare --match-gmcas=3", "did you mean --match_gmacs"),
    ("slim --keep=3", "no setting --keep"),
    ("visualize a.png --layr 2", "did you mean --layer"),
    ("fit --config quickstrat", "--config quickstrat: neither a file.*did you mean quickstart"),
    ("fit --config no_such_thing", "neither a file nor one of the shipped config.*: addons/ema"),
    ("fit --config=strategies/evti", "did you mean strategies/evit"),
    ("fit --config twice.yaml", "twice.yaml: 'lr' stands there twice, again in line 4"),
    ("fit --config list.yaml", "list.yaml: model must hold settings by name.*got a list"),
    ("fit --config items.yaml", "items.yaml must hold settings by name.*got a list"),
    ("fit --config word.yaml", "word.yaml must hold settings by name.*got a str"),
    ("fit --config syntax.yaml", "syntax.yaml, line 2: this is no YAML"),
    ("fit --config key.yaml", "key.yaml: there is no setting model.keep_raet"),
    ("fit --config section.yaml", "section.yaml: there is no setting modle; did you mean model"),
    ("compare --config key.yaml", "model must be text, got {'keep_raet': 0.5}"),
    ("fit --config .", "--config .: neither a file"),
]

#: Told by the parser.
PARSED = [
    ("--model.strategy=EVit", "model.strategy: there is no Strategy 'EVit'; did you mean EViT\\?"),
    ("--model.strategy=Nonsense", "no Strategy 'Nonsense'; known are .*EViT.*TDM"),
    ("--model.strategy=TokenMerger", "no Strategy 'TokenMerger'; known are .*TDM"),
    ("--model.strategy=collections.OrderedDict", "must be a Strategy by its class_path"),
    ("--model.strategy=no_module.Mine", "model.strategy: No module named 'no_module'"),
    ("--model.strategy=tests.helpers.Mine", "model.strategy: .*has no attribute 'Mine'"),
    ("--model.strategy=[SViTE,TDMM]", "no Strategy 'TDMM'; did you mean TDM"),
    ("--model.strategy=[3]", "model.strategy must be a Strategy by its class_path, got 3"),
    ("--model.strategy=EViT --model.strategy.merger=TokenMergr", "did you mean TokenMerger"),
    ("--model.strategy.keep_rat=0.5", "TDM has no argument 'keep_rat'; did you mean keep_rate"),
    ("--config argument.yaml", "TDM has no argument 'keep_raet'; did you mean keep_rate"),
    ("--model.strategy.keep_rate=nan", r"keep_rate must be a number in \(0, 1\], got 'nan'"),
    ("--model.strategy.keep_rate=half", r"keep_rate must be a number in \(0, 1\], got 'half'"),
    ("--model.strategy.layers=3", r"sequence of block indices such as \(3, 6, 9\), got 3"),
    (
        "--model.strategy=EViT --model.strategy.merger=TokenMerger --model.strategy.merger.size=3",
        "model.strategy.merger: TokenMerger has no argument 'size'; it takes cluster_fraction,",
    ),
    ("--model.lr=fast", "model.lr must be a number, got fast"),
    ("--model.warmup_epochs=long", "model.warmup_epochs must be a number, got long"),
    ("--model.train_in_eval_mode=perhaps", "must be true or false, got perhaps"),
    ("--model.model_kwargs=3", "model.model_kwargs must be settings by name or null, got 3"),
    ("--model.num_classes=3", "model.num_classes follows from data and cannot be set by itself"),
    ("--data.batch_size=some", "data.batch_size must be a whole number, got some"),
    ("--data.scale=[1]", r"data.scale must be a list of 2, got \[1\]"),
    ("--data.streaming=maybe", "data.streaming must be true or false, got maybe"),
    ("--trainer.max_epochs=many", "trainer.max_epochs must be a whole number or null, got many"),
    ("--trainer.precision=17", "trainer.precision must be one of 64, .*bf16-mixed.*null, got 17"),
    ("--trainer.callbacks=KeepRateWarmp", "no Callback 'KeepRateWarmp'; did you mean KeepRateW"),
    ("--trainer.logger=Foo", "trainer.logger: there is no Logger 'Foo'; known are CSVLogger"),
    (
        "--trainer.callbacks=KeepRateWarmup --trainer.callbacks.start_epoch=x",
        "trainer.callbacks: start_epoch must be an integer, got 'x'",
    ),
    ("--seed_everything=x", "seed_everything must be true or false or a whole number, got x"),
    ("--model.l=3", "ambiguous option: --model.l=3 could match .*--model.lr,"),
    ("--trainer.max_epochs", "--trainer.max_epochs needs a value"),
    ("extra", "'extra' is not expected; settings are given as --NAME VALUE"),
    ("--ckpt_path=no.ckpt", "there is no checkpoint 'no.ckpt', which --ckpt_path names"),
    ("--ckpt_path=folder", "there is no checkpoint 'folder', which --ckpt_path names"),
    ("--ckpt_path=cut.ckpt", "cut.ckpt is not a readable checkpoint: it is cut off or damaged"),
    ("--ckpt_path=empty.ckpt", "empty.ckpt is not a readable checkpoint"),
    ("--ckpt_path=text.ckpt", "text.ckpt was not loaded.*a .safetensors file$"),
    ("--ckpt_path=code.ckpt", "code.ckpt was not loaded.*asks for print.*a .safetensors file$"),
    ("--ckpt_path=plain.ckpt", "plain.ckpt is no checkpoint of `tdm fit`.*--model.weights plain"),
]

#: Told by what the settings make.
MADE = [
    ("--model.strategy.keep_rate=0", r"keep_rate must lie in \(0, 1\], got 0.0"),
    ("--model.strategy.keep_rate=1.5", r"keep_rate must lie in \(0, 1\], got 1.5"),
    ("--config rate.yaml", r"keep_rate must lie in \(0, 1\], got 0"),
    ("--model.strategy.layers=[3,3]", r"layers must not repeat a block, got \[3, 3\]"),
    ("--model.strategy.layers=[-1]", "layers count from 0 and cannot be negative"),
    ("--model.strategy.layers=[3,99]", r"layers \[99\] do not exist: the model has 12 blocks"),
    ("--model.model=vit_tny_patch16_224", "no model 'vit_tny_patch16_224'; did you mean vit_tiny_"),
    ("--model.model=resnet18 --model.model_kwargs={}", "cannot reduce the tokens of ResNet"),
    ("--model.model_kwargs={img_szie: 32}", "cannot make a 'vit_tiny_patch16_224' with .*img_szie"),
    ("--model.optimizer=adamv", "timm has no optimizer 'adamv'; did you mean adam"),
    ("--model.weights=no/such/file.pth", "there are no weights at 'no/such/file.pth'"),
    ("--model.weights=cut.ckpt", "cut.ckpt is not a readable checkpoint"),
    ("--model.weights=code.ckpt", "code.ckpt was not loaded"),
    ("--data.dataset=no/such/folder/at/all", "'no/such/folder/at/all': no such file or folder"),
    ("--data.dataset=empty", "'empty': no images.*laid out SPLIT/CLASS/IMAGE"),
    ("--data.batch_size=0", "batch_size must be at least 1, got 0"),
    ("--data.num_classes=1", "num_classes must be at least 2, got 1"),
    ("--data.val_holdout=1", r"val_holdout must lie in \[0, 1\)"),
    ("--data.dataset=one", "all images have one class, 'ant'; expected at least two"),
    ("--data.dataset=one --data.label_column=klass", "no label column 'klass'"),
    ("--trainer.accelerator=warp", "the Trainer refuses its settings: .*warp"),
    ("--trainer.max_epochs=-2", "max_epochs. must be a non-negative integer or -1"),
]

OTHERS = [
    ("compare --model test_vit --precision int3", "precision must be one of 'float32'"),
    ("compare --model test_vit --strategies [TDMM]", "no Strategy 'TDMM'; did you mean TDM"),
    (
        "compare --model test_vit --strategies [TDM]",
        r"does not fit test_vit: layers \[6, 9\] do not",
    ),
    ("compare --model test_vot", "no model 'test_vot'; did you mean test_vit"),
    ("compare --rounds x", "rounds must be a whole number, got x"),
    ("compare --rounds", "--rounds needs a value"),
    ("compare --model test_vit --rounds 0", "rounds must be at least 1, got 0"),
    (
        "compare --data digits",
        "must be a ImageNetDataModule by its|no ImageNetDataModule .digits",
    ),
    ("rates --model test_vit", "give --match_gmacs NUMBER"),
    ("rates --match_gmacs much", "match_gmacs must be a number or null, got much"),
    ("slim --model test_vit", "a search needs images: give --data ImageNetDataModule"),
    ("export --model test_vit", "give --weights FILE"),
    ("export --model test_vit --weights cut.ckpt", "cut.ckpt is not a readable checkpoint"),
    ("export --model test_vit --weights code.ckpt", "code.ckpt was not loaded"),
    ("visualize", "the following arguments are required: images"),
    ("visualize no.png", "give --weights FILE"),
    ("visualize no.png --weights cut.ckpt", "cut.ckpt is not a readable checkpoint"),
    ("visualize no.png --weights code.ckpt", "code.ckpt was not loaded"),
    ("visualize no.png --weights nothing.ckpt", "there are no weights at 'nothing.ckpt'"),
    (
        "visualize no.png --random_weights true --model test_vit"
        " --strategy {class_path: TDM, init_args: {layers: [1]}}",
        "no.png",
    ),
]


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code of a file was run",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the files lie that the rows name."""
    here = tmp_path_factory.mktemp("inputs")
    for name, text in FILES.items():
        (here / name).write_text(text)
    run = {"pytorch-lightning_version": "2.6", "hyper_parameters": {}}
    torch.save({"weight": torch.zeros(1000)}, here / "plain.ckpt")
    torch.save({**run, "state_dict": Code()}, here / "code.ckpt")
    (here / "cut.ckpt").write_bytes((here / "plain.ckpt").read_bytes()[:1000])
    for name in ("folder", "empty"):
        (here / name).mkdir()
    make_image_folder(here / "one", classes=1, per_class=2, splits=["train", "validation", "test"])
    datasets.disable_progress_bars()
    yield here
    datasets.enable_progress_bars()


def check(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tdm", *arguments])
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)  # Lightning's seed
    with pytest.raises(SystemExit) as stop:
        entry()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"tdm( \w+)?: error: ", line)
    assert re.search(message, line), line
    assert "weights_only" not in line
    assert stop.value.code == 2
    assert not (folder / "runs").exists()


def split(text):
    """As a shell does, but for braces with blanks in them."""
    return shlex.split(re.sub(r"(\{.*\})", r"'\1'", text))


def rows(*tables):
    """Numbered: a name like `export` would make a test a slow one."""
    table = [row for one in tables for row in one]
    return pytest.mark.parametrize(("text", "message"), table, ids=map(str, range(len(table))))


@rows(AT_ONCE, OTHERS)
def test_it_ends_with_code_2_and_one_line(text, message, folder, monkeypatch, capsys):
    check(split(text), message, folder, monkeypatch, capsys)


@rows(PARSED, MADE)
def test_so_does_a_run(text, message, folder, monkeypatch, capsys):
    arguments = ["fit", *BRIEF.split(), *split(text)]
    check(arguments, message, folder, monkeypatch, capsys)


def test_called_from_python_it_raises(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(tdm.errors.TokenReductionError, match="keep_rate must lie"):
        main(["fit", *BRIEF.split(), "--model.strategy.keep_rate=0"])


# Bugs ---------------------------------------------------------------------------------------


class Broken(tdm.TDM):
    """A user's own strategy with a mistake in it."""

    where: str = ""
    error: Exception = ValueError()

    def __init__(self, keep_rate: float = 0.7, layers: tuple[int, ...] = (1, 3)):
        super().__init__(keep_rate, layers)
        self.fail("__init__")

    def fail(self, where):
        if self.where == where:
            raise self.error

    def bind(self, vit, info):
        self.fail("bind")
        super().bind(vit, info)

    def after_attention(self, index, tokens, seen):
        self.fail("after_attention")
        return super().after_attention(index, tokens, seen)


BUGS = [
    ("__init__", ValueError),
    ("__init__", KeyError),
    ("bind", TypeError),
    ("bind", FileNotFoundError),
    ("after_attention", ValueError),
    ("after_attention", TypeError),
    ("after_attention", OSError),
]


@pytest.mark.parametrize(("where", "kind"), BUGS)
def test_a_bug_in_a_users_class_keeps_its_traceback(where, kind, tmp_path, monkeypatch):
    arguments = ["fit", *BRIEF.split(), f"--model.strategy={__name__}.Broken"]
    keeps_its_traceback(arguments, kind, where, tmp_path, monkeypatch)


@pytest.mark.parametrize("where", ["__init__", "bind"])
def test_so_it_does_in_other_commands(where, tmp_path, monkeypatch):
    for command, *options in (
        ("export", "--random_weights=true", f"--strategy={__name__}.Broken"),
        ("compare", "--rounds=1", f"--strategies=[{__name__}.Broken]"),
    ):
        arguments = [command, "--model=test_vit", *options]
        keeps_its_traceback(arguments, ValueError, where, tmp_path, monkeypatch)


def keeps_its_traceback(arguments, kind, where, tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "where", where)
    monkeypatch.setattr(Broken, "error", kind("a mistake of one's own"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tdm", *arguments])
    with pytest.raises(kind, match="mistake of one's own") as caught:
        entry()
    assert any(entry.name == where for entry in caught.traceback)
    assert not isinstance(caught.value, tdm.errors.TokenReductionError)
