"""Files that run without this library, checked before they are handed out."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning import export
from tdm_lightning.cli import main
from tests.helpers.exporting import check_compiled, check_exported
from tests.vit.test_families import made

TINY = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


def reduced(strategy, **kwargs):
    torch.manual_seed(3)
    vit = VisionTransformer(**{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return tdm.attach(vit, strategy)


@pytest.fixture
def model():
    return reduced(tdm.EViT(0.5, (1,), fuse=False))


# What is in the file --------------------------------------------------------------------------


def test_an_onnx_file_says_what_it_takes_and_gives(model, tmp_path):
    path = tmp_path / "m.onnx"
    written = export.export_onnx(model, path, images=torch.randn(3, 3, 16, 16))
    assert written.path == path
    assert written.inputs == {"images": ("batch", 3, 16, 16)}
    assert written.outputs == {"logits": ("batch", 5)}
    assert written.size == sum(file.stat().st_size for file in tmp_path.iterdir()) > 10_000
    assert 0 <= written.agreement.difference < 1e-4
    assert (written.agreement.images, written.agreement.ties) == (11, 0)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, logits.name) == ("images", "logits")
    assert isinstance(image.shape[0], str)
    assert image.shape[1:] == [3, 16, 16]
    assert len(onnx.load(path).graph.output) == 1
    assert b"tdm_lightning/vit" not in path.read_bytes()  # no file of this machine is named


def test_a_file_that_is_not_run_is_not_compared(tmp_path, monkeypatch):
    """For random weights, whose near ties rounding may decide."""
    monkeypatch.setattr(export.files, "compare_logits", lambda *_: pytest.fail("compared"))
    export.write_onnx(timm.create_model("test_vit", depth=2), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size > 100_000


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A model in training, in bfloat16 and with a part in evaluation mode, what it was before its
    export, and the file.
    """
    model = reduced(tdm.TDM(0.5, (1,))).to(torch.bfloat16).train()
    model.vit.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = export.export_program(model, tmp_path_factory.mktemp("program") / "m.pt2")
    return model, modes, before, written


def test_a_program_runs_with_torch_alone(program):
    model, _, _, written = program
    images = torch.randn(7, 3, 16, 16)
    found = torch.export.load(written.path).module()(images)
    assert found.dtype == torch.float32
    with torch.no_grad():
        wanted = copy.deepcopy(model).float().eval()(images)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert written.size == written.path.stat().st_size
    assert written.outputs == {"logits": ("batch", 5)}
    assert b"tdm_lightning/vit" not in written.path.read_bytes()


@pytest.mark.parametrize("write", [export.export_onnx, export.export_program])
def test_every_batch_size_gives_the_same_logits(write, tmp_path):
    model, images = reduced(tdm.TDM(0.5, (0,))), torch.randn(8, 3, 16, 16)
    write(model, tmp_path / "m")
    if write is export.export_program:
        run = torch.export.load(tmp_path / "m").module()
    else:
        session = onnxruntime.InferenceSession(tmp_path / "m", providers=["CPUExecutionProvider"])
        run = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])  # noqa: E731
    with torch.no_grad():
        wanted = model(images)
        for size in range(1, len(images) + 1):
            torch.testing.assert_close(run(images[:size]), wanted[:size], atol=1e-4, rtol=1e-4)


def test_the_model_stays_as_it_was(program):
    model, modes, before, _ = program
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).sum().backward()


def test_the_plain_model_can_be_exported_to_compare_with(tmp_path):
    vit = VisionTransformer(**TINY)
    assert export.export_program(vit, tmp_path / "m.pt2").agreement.difference < 1e-5


def test_another_image_size_where_the_model_takes_it(tmp_path):
    model = reduced(tdm.EViT(0.5, (1,)), dynamic_img_size=True)
    written = export.export_program(model, tmp_path / "m.pt2", input_size=(3, 24, 16))
    assert written.inputs == {"images": ("batch", 3, 24, 16)}


@pytest.mark.parametrize("size", [(3, None, None), (3, -1, -1), (24, 16)])
def test_a_file_takes_one_size(model, size, tmp_path):
    with pytest.raises(ValueError, match="a file takes one; export a file for each size"):
        export.export_program(model, tmp_path / "m.pt2", input_size=size)


def test_a_size_that_the_model_does_not_take(model, tmp_path):
    with pytest.raises(ValueError, match="must be 16×16 for this model, got 24×16"):
        export.export_program(model, tmp_path / "m.pt2", input_size=(3, 24, 16))
    assert not list(tmp_path.iterdir())


# Strategies and families ----------------------------------------------------------------------

STRATEGIES = {
    "dpcknn": lambda: tdm.DPCKNN(0.5, (1,)),
    "random": lambda: tdm.Random(0.5, (1,)),
    "stack": lambda: [tdm.SViTE(), tdm.TDM(0.5, (1,))],
}


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_strategies_run_in_onnx_runtime(name, tmp_path):
    check_exported(reduced(STRATEGIES[name]()), torch.randn(3, 3, 16, 16), tmp_path / "m.onnx")


FAMILIES = {
    "eva": lambda: tdm.TDM(0.5, (1,)),
    "beit": lambda: tdm.ToMe([0, 5]),
    "relpos": lambda: tdm.EViT(0.5, (1,)),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_positions_follow_the_tokens_in_onnx_runtime(name, tmp_path):
    check_exported(
        tdm.attach(made(name), FAMILIES[name]()), torch.randn(3, 3, 32, 32), tmp_path / "m.onnx"
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families_compile_without_a_graph_break(name):
    check_compiled(tdm.attach(made(name), FAMILIES[name]()), torch.randn(2, 3, 32, 32))


# What cannot be exported ----------------------------------------------------------------------

ADAPTIVE = {
    "avit": lambda: tdm.AViT(),
    "iared2": lambda: tdm.IARED2(groups=2),
    "mame": lambda: tdm.MaMe(layers=(0,)),
    "mpm": lambda: tdm.MPM(layers=(0,)),
    "spvit": lambda: tdm.SPViT((1,)),
}


@pytest.mark.parametrize("write", [export.export_onnx, export.export_program])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_strategies_are_refused(name, write, tmp_path):
    model = reduced(ADAPTIVE[name]())
    with pytest.raises(
        ValueError, match="another number of tokens for each image.*fixed budget, such as TDM"
    ):
        write(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_adaptive_strategies_compile_with_breaks():
    model, images = reduced(tdm.SPViT((1,))), torch.randn(3, 3, 16, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(model, backend="eager")(images), model(images), atol=1e-5, rtol=1e-5
    )


def test_a_model_that_draws_at_random_is_refused(tmp_path):
    model = reduced(tdm.SPViT((1,), fixed_count=True, stochastic=True))
    with pytest.raises(ValueError, match="draws at random"):
        export.export_program(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


class Twofold(tdm.Strategy):
    """Something else in a graph than outside: what an exporter's mistake would look like."""

    def finish(self, tokens):
        return tokens.replace(x=tokens.x.cos()) if torch.compiler.is_compiling() else tokens


def test_a_file_with_other_logits_is_not_kept(tmp_path):
    with pytest.raises(
        ValueError, match="other logits than the model for 1 of 1 images.*no file was kept"
    ):
        export.export_program(reduced(Twofold()), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(model, package, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export.files, "find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(
        ValueError, match=rf"needs {package}: pip install 'tdm-lightning\[export\]'"
    ):
        export.export_onnx(model, tmp_path / "m.onnx")


def test_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        export.export_program(model, tmp_path / "missing" / "m.pt2")


# The command ----------------------------------------------------------------------------------

SETTINGS = [
    "--model=deit_tiny_patch16_224",
    '--model_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2}',
]
SETTINGS = [*SETTINGS, "--model_kwargs.num_heads=2", "--strategy=EViT", "--strategy.layers=[1]"]


def test_command_exports_from_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    Image.fromarray(ramp).save("photo.png")
    main(["export", *SETTINGS, "--random_weights=true", '--images=["photo.png"]', "--format=pt2"])
    printed = capsys.readouterr().out
    assert "model.pt2: 0." in printed
    assert "logits differ by at most" in printed
    assert "input images: batch×3×16×16, float32\noutput logits: batch×1000, float32" in printed
    assert torch.export.load("model.pt2").module()(torch.zeros(4, 3, 16, 16)).shape == (4, 1000)


def test_command_exports_for_another_size(tmp_path, capsys):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    arguments = [*SETTINGS, "--model_kwargs.dynamic_img_size=true", "--random_weights=true"]
    arguments += ["--input_size=[3, 24, 32]", f'--images=["{tmp_path / "photo.png"}"]']
    main(["export", *arguments, "--format=pt2", f"--out={tmp_path / 'm.pt2'}"])
    assert "input images: batch×3×24×32" in capsys.readouterr().out


def test_command_exports_a_shared_model(tmp_path):
    vit = timm.create_model("deit_tiny_patch16_224", **TINY)
    model = tdm.attach(vit, tdm.EViT(0.5, (1,))).eval()
    model.save_pretrained(tmp_path / "shared", config={"model_args": TINY})
    path = main(["export", f"--weights={tmp_path / 'shared'}", f"--out={tmp_path / 'm.onnx'}"])
    session, images = onnxruntime.InferenceSession(path), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=1e-4)


def test_command_wants_trained_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="untrained"):
        main(["export", *SETTINGS])
    with pytest.raises(ValueError, match="cannot read"):
        main(["export", *SETTINGS, "--random_weights=true", '--images=["missing.png"]'])
    assert not list(tmp_path.iterdir())
