"""What the README and the pages in docs/ show runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

import tdm_lightning as tdm
from tdm_lightning.cli import main

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"))
}

#: What tells each block of Python from all others.
KEYS = (
    "logits = model(torch.randn",
    "logits, trace",
    "class FocalClassifier",
    "class Neighbours",
    "class Norm",
    "tdm.register_adapter(",
    "trainer.fit(your_module",
    "DiversityRecorder(model)",
    "save_pretrained",
    "tdm.TokenReduction(",
    "tdm.accelerate(",
    "AutoModelForImageClassification",
    "forward_merged(",
    "story = tell(",
    "export_compiled(",
    "aoti_load_package(",
    "torch.export.Dim(",
    "print(tdm.flops.count_macs(model))",
    "alike = (",
    "student = ",
)


def blocks(language):
    """All blocks of code in a language, with their page."""
    for page, text in PAGES.items():
        for code in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL):
            yield page, code


def block(key):
    assert key in KEYS
    (found,) = [code for _, code in blocks("python") if key in code]
    return found


@pytest.fixture
def untrained(monkeypatch):
    """The same model without its pretrained weights, which need a download."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs)
    )


def test_five_lines_and_what_follows(untrained):
    names = {"images": torch.zeros(1, 3, 224, 224)}
    exec(block("logits = model(torch.randn"), names)
    exec(block("logits, trace"), names)
    assert names["logits"].shape == (1, 1000)
    assert names["trace"].token_counts[::3] == [163, 136, 113, 94]
    assert tdm.flops.count_macs(names["model"]) == 3004463616
    assert tdm.flops.count_macs(names["paper"]) == 2996994816
    assert tdm.flops.count_macs(names["stacked"]) == 2996994816


def test_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    monkeypatch.setattr(
        transformers.AutoModelForImageClassification,
        "from_pretrained",
        lambda name: transformers.ViTForImageClassification(transformers.ViTConfig()),
    )
    monkeypatch.setattr(
        transformers.AutoImageProcessor,
        "from_pretrained",
        lambda name, **_: transformers.ViTImageProcessor(),
    )
    code, names = block("AutoModelForImageClassification"), {}
    before, end = code.split("tdm.detach")
    exec(before, names)
    assert tdm.find_vit(names["model"]).in_place
    exec(f"tdm.detach{end}", names)
    assert type(tdm.find_vit(names["model"])) is transformers.ViTModel


def test_subclass():
    names = {"__name__": "readme"}
    exec(block("class FocalClassifier"), names)
    module = names["FocalClassifier"](
        gamma=1.0, model="test_vit", num_classes=4, mixup=0.0, cutmix=0.0
    )
    criterion = module.configure_criterion()
    logits, target = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    plain = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(criterion(logits, target), (1 - (-plain).exp()) * plain)
    assert module.hparams.gamma == 1.0


def test_own_strategy():
    code = block("class Norm")
    assert len(code[code.index("class Norm") :].strip().splitlines()) <= 20
    names = {"__name__": "readme"}
    exec(code, names)
    vit = timm.create_model("test_vit", img_size=96).eval()
    model = tdm.attach(vit, names["Norm"](keep_rate=0.5, layer=2))
    logits, trace = model.trace(torch.randn(2, 3, 96, 96))
    assert trace.token_counts == [36, 36, 18, 18, 18, 18]
    assert (trace.layers[0].assignment >= 0).sum(1).tolist() == [18, 18]
    assert torch.isfinite(logits).all()
    plain = tdm.attach(vit, names["Norm"](keep_rate=1.0))
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(plain(images), vit(images))


def test_callbacks_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = tdm.attach(
                timm.create_model("test_vit", img_size=96, num_classes=3), tdm.TDM(0.5, (1, 3))
            )

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    code = block("trainer.fit(your_module")
    settings = (
        "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,"
        " enable_progress_bar=False,"
    )
    loader = DataLoader(
        TensorDataset(torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 0])), batch_size=2
    )
    exec(
        code.replace("max_epochs=300,", settings), {"your_module": Foreign(), "your_loader": loader}
    )


@pytest.fixture
def reduced():
    torch.manual_seed(0)
    return tdm.attach(
        timm.create_model("test_vit", img_size=96, num_classes=3), tdm.TDM(0.5, (1, 3))
    )


def test_a_loop_of_ones_own(reduced, capsys):
    loader = DataLoader(
        TensorDataset(torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 0])), batch_size=2
    )
    exec(block("DiversityRecorder(model)"), {"model": reduced, "loader": loader})
    printed = capsys.readouterr().out
    scores = eval(printed[: printed.index("]") + 1])
    assert len(scores) == 6
    assert all(score > 0 for score in scores)
    assert float(printed[printed.index("]") + 1 :]) * 1e9 == pytest.approx(
        tdm.flops.count_macs(reduced)
    )
    assert not any(point._forward_hooks for point in reduced.hook_points)


def test_sharing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tdm.attach(timm.create_model("test_vit"), tdm.TDM(0.5, (1, 3))).eval()
    names = {"model": model, "tdm": tdm}
    exec(block("save_pretrained"), names)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(names["same"].eval()(images), model(images))


def test_exported_files(reduced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block("export_compiled("), {"model": reduced})
    images = torch.randn(3, 3, 96, 96)
    names = {"images": images}
    exec(block("aoti_load_package("), names)
    with torch.no_grad():
        torch.testing.assert_close(names["logits"], reduced.eval()(images), atol=1e-4, rtol=1e-4)


def test_an_exported_encoder():
    transformers = pytest.importorskip("transformers", minversion="5.20")
    shape = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).eval()
    tdm.attach(encoder, tdm.WardTDM(0.7, (0,)))
    images = torch.randn(2, 3, 32, 32)
    names = {"torch": torch, "encoder": encoder, "images": images}
    with torch.no_grad():
        exec(block("torch.export.Dim("), names)
        found = names["program"].module()(pixel_values=images[:1])[0]
        torch.testing.assert_close(found, encoder(images[:1])[0], atol=1e-4, rtol=1e-4)


def test_a_fast_pass(reduced):
    reduced.eval()
    images = torch.randn(2, 3, 96, 96)
    expected = reduced(images)
    names = {"tdm": tdm, "torch": torch, "model": reduced, "images": images}
    exec(block("tdm.accelerate("), names)
    torch.testing.assert_close(names["logits"], expected, atol=1e-5, rtol=1e-4)


def test_merged_tokens(reduced):
    names = {"tdm": tdm, "model": torch.nn.ModuleList([reduced])}
    names["images"] = torch.randn(2, 3, 96, 96)
    exec(block("forward_merged("), names)
    assert names["tokens"].shape == (2, 9, 64)
    assert names["size"].sum(dim=1).tolist() == [36, 36]


def test_a_triple_in_python_and_yaml(tmp_path, capsys):
    names = {}
    exec(block("tdm.TokenReduction("), names)
    (settings,) = [code for _, code in blocks("yaml") if "class_path: TokenReduction" in code]
    path = tmp_path / "triple.yaml"
    path.write_text(settings)
    with pytest.raises(SystemExit):
        main(["fit", "--config=deit_small", f"--config={path}", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["strategy"]
    assert tdm.Strategy.from_config(found).config() == names["strategy"].config()


def test_the_manual_begins(capsys):
    exec(block("print(tdm.flops.count_macs(model))"), {})
    assert capsys.readouterr().out == "3004463616\n"


def test_a_rate_from_a_budget():
    vit = timm.create_model("test_vit", img_size=96, depth=12).eval()
    budget = tdm.flops.count_macs(vit) / 2
    code = block("alike = (").replace("gmacs=2.5", f"gmacs={budget / 1e9}")
    names = {"tdm": tdm, "vit": vit, "images": torch.randn(2, 3, 96, 96)}
    exec(code, names)
    assert tdm.flops.count_macs(names["reduced"]) <= budget
    assert 0 <= names["alike"] <= 1


def test_a_fine_tune_of_ones_own():
    vit = timm.create_model("test_vit", img_size=96, num_classes=3)
    before = vit.head.weight.detach().clone()
    code = block("student = ").replace("keep_rate=0.5", "0.5, (1, 3)")
    loader = [(torch.randn(2, 3, 96, 96), torch.tensor([0, 2]))]
    names = {"tdm": tdm, "torch": torch, "vit": vit, "loader": loader}
    exec(code, names)
    assert torch.isfinite(names["loss"])
    assert not torch.equal(vit.head.weight, before)


def test_a_merger():
    names = {}
    exec(block("class Neighbours"), names)
    vit = timm.create_model("test_vit", img_size=96).eval()
    model = tdm.attach(vit, tdm.EViT(0.5, (2,), merger=names["Neighbours"]()))
    _, trace = model.trace(torch.randn(2, 3, 96, 96))
    assert trace.token_counts == [36, 36, 18, 18, 18, 18]


def test_a_model_is_registered(monkeypatch):
    called = []
    monkeypatch.setattr(tdm, "register_adapter", lambda *names: called.append(names))
    exec(block("tdm.register_adapter("), {"tdm": tdm, "TheirViT": int, "TheirAdapter": str})
    assert called == [(int, str)]


# The pages themselves ---------------------------------------------------------------------------


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit = timm.create_model("test_vit", img_size=96)
    names = {"model": tdm.attach(vit, tdm.ToMe(4)), "image": torch.randn(3, 96, 96)}
    exec(block("story = tell("), names)
    assert {path.name for path in tmp_path.iterdir()} == {"cat.gif", "cat.html"}


def test_every_block_of_python_is_tried_above():
    assert [sum(key in code for key in KEYS) for _, code in blocks("python")] == [1] * len(KEYS)


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_and_links_lead_somewhere(page):
    text = PAGES[page]
    assert [line for line in text.splitlines() if len(line) > 100] == []
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        target, _, section = link.partition("#")
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert section in [
                re.sub(r"[^a-z0-9-]", "", t.lower().replace(" ", "-")) for t in titles
            ]


def test_the_readme_is_a_page_to_read_at_once():
    assert len(PAGES["README.md"].splitlines()) <= 160


def commands(verb):
    """Those shown that can be parsed without files of the reader's."""
    for page, code in blocks("bash"):
        for line in code.replace("\\\n", " ").splitlines():
            line = line.strip().removesuffix("&&")
            absent = any(word in line for word in ("…", "path/to", "$CKPT"))
            unread = absent or line.count("'") % 2
            if line.startswith(f"tdm {verb} ") and not unread:
                arguments = shlex.split(line, comments=True)[1:]
                yield pytest.param(arguments, id=f"{page}: {' '.join(arguments)}")


@pytest.mark.parametrize("arguments", [*commands("visualize")])
def test_commands_to_draw_are_understood(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["images"] in (["cat.jpg"], ["astronaut.png"])


@pytest.mark.parametrize("arguments", [*commands("fit")])
def test_commands_to_train_are_understood(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["strategy"]


@pytest.mark.parametrize(
    "arguments", [case for verb in ("compare", "rates") for case in commands(verb)]
)
def test_commands_of_other_tools_are_understood(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code == 0
    assert "weights" in yaml.safe_load(capsys.readouterr().out)
