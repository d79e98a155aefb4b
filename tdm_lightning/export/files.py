"""Write a reduced model to a file that runs without this library, and check the file.

Strategies with a fixed budget have static shapes but for the batch, so they can be exported, and
compiled with ``torch.compile(model, fullgraph=True)``. Those that keep another number of tokens for
each image (``strategy.adaptive``) can not be exported; ``torch.compile(model)`` takes them with
breaks in the graph. How many tokens stay follows from the size of the images, so a file takes one
size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tdm_lightning.errors import SettingError
from tdm_lightning.export.agreement import Agreement, compare_logits
from tdm_lightning.export.aoti import load_package, save_package
from tdm_lightning.flops import default_input_size
from tdm_lightning.ops.linear import check_not_quantized
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.in_place import reduced_in_place

Writer = Callable[[torch.export.ExportedProgram, Path], Any]

#: Largest batch that a file takes. Without one older torch finds that 2⁶³ - 1 images would need
#: another graph.
_MOST = 2**31 - 1

#: Batch sizes at which a file is run before it is handed out.
BATCH_SIZES = (1, 2, 5)


@dataclass(frozen=True)
class Exported:
    """A file that was written and gave the model's logits.

    Attributes:
        path: the file.
        size: bytes, with the weights where they lie in a file of their own.
        inputs: shape of each input by name; a word stands for a size that is free.
        outputs: likewise.
        agreement: of its logits with the model's.
    """

    path: Path
    size: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    agreement: Agreement


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor | None = None,
    input_size: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write an ONNX file for batches of any size, in float32, and compare it with the model in ONNX
    Runtime.

    The model itself stays as it is: the file is made from a copy in evaluation mode.

    Args:
        model: a reduced model, or a plain timm ViT to compare with.
        path: the file to write.
        images: B×C×H×W, to compare on beside random ones.
        input_size: channels, height and width of the images that the file takes; the model's own by
            default. One file takes one size.
        progress: where to show a bar.

    Raises:
        ValueError: if a package is missing, the number of tokens depends on the image, the model
            takes no images of that size or gives more than a tensor, linear layers are quantised,
            the file cannot be written, or its logits are not the model's, see
            :func:`~tdm_lightning.export.agreement.compare_logits`; then no file is left.
    """
    _check_packages()
    import onnxruntime

    def load(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(
            session.run(["logits"], {"images": images.numpy()})[0]
        )

    return _exported(model, Path(path), images, input_size, save_onnx, load, progress)


def write_onnx(model: nn.Module, path: str | Path) -> None:
    """As :func:`export_onnx`, but the file is not run: for random weights, whose near ties rounding
    may decide in another way.

    Raises:
        ValueError: as there, but for other logits.
    """
    _check_packages()
    _write(model, Path(path), default_input_size(model), save_onnx)


def export_program(
    model: nn.Module,
    path: str | Path,
    images: Tensor | None = None,
    input_size: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a program of ``torch.export`` (``.pt2``): ``torch.export.load(path).module()(images)``
    runs it with torch alone.

    Arguments and errors as :func:`export_onnx`; it needs no further package. Linear layers that
    torchao quantised are welcome; then running the file needs torchao too.
    """

    def load(path: Path) -> Callable[[Tensor], Tensor]:
        return torch.export.load(path).module()

    return _exported(model, Path(path), images, input_size, torch.export.save, load, progress)


def export_compiled(
    model: nn.Module,
    path: str | Path,
    images: Tensor | None = None,
    input_size: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a package of AOTInductor (``.pt2``), compiled for the CPU of this machine:
    ``torch._inductor.aoti_load_package(path)(images)`` runs it with the torch that made it.

    Arguments and errors as :func:`export_onnx`; it needs no further package but a C++ compiler, to
    write it only, and takes minutes.
    """
    if Path(path).suffix != ".pt2":
        raise SettingError(f"torch loads packages whose name ends in .pt2 only, got {str(path)!r}")
    path = Path(path)
    return _exported(model, path, images, input_size, save_package, load_package, progress)


def check_static(model: nn.Module) -> None:
    """Whether a model's shapes depend on nothing but the batch size, as a file or a single compiled
    graph needs it.

    Raises:
        ValueError: if the number of tokens depends on the image.
    """
    if isinstance(model, TokenReducedViT) and model.strategy.adaptive:
        name = type(model.strategy).__name__
        raise SettingError(
            f"{name} keeps another number of tokens for each image, so its shapes are not static"
            " and it cannot be exported, or compiled in one graph. Take a strategy with a fixed"
            f" budget, such as TDM, EViT or SPViT(fixed_count=True), or run {name} with"
            " torch.compile(model), which breaks the graph"
        )


def _check_gives_tensor(model: nn.Module) -> None:
    """Whether a model takes images alone and gives a tensor, which one that its own library runs
    does not.

    Raises:
        ValueError: if :func:`~tdm_lightning.attach` reduced it in its place.
    """
    if any(map(reduced_in_place, model.modules())) and not isinstance(model, TokenReducedViT):
        raise SettingError(
            f"{type(model).__name__} is run by its own library and gives more than a tensor: export"
            " its encoder, tdm.find_vit(model), or the whole by torch.export.export(), see"
            " docs/deploy.md"
        )


def _checked_size(size: Sequence[Any] | None) -> tuple[int, int, int] | None:
    """Channels, height and width.

    Raises:
        ValueError: if one of them is left open, or there are not three.
    """
    if size is None:
        return None
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise SettingError(
            f"input_size must be channels, height and width in pixels, got {tuple(size)}: how many"
            " tokens stay follows from the size, so a file takes one; export a file for each size"
        )
    return size[0], size[1], size[2]


def _check_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise SettingError(
                f"writing and checking ONNX files needs {package}: pip install"
                " 'tdm-lightning[export]'"
            )


def save_onnx(program: torch.export.ExportedProgram, path: Path, optimize: bool = True) -> None:
    """Write a program of :func:`trace_model` as ONNX, with or without simplifying the graph."""
    written: Any = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
        optimize=optimize,
    )
    written.save(path)


@torch.no_grad()
def _exported(
    model: nn.Module,
    path: Path,
    images: Tensor | None,
    input_size: tuple[int, int, int] | None,
    write: Writer,
    load: Callable[[Path], Callable[[Tensor], Tensor]],
    progress: Progress | None,
) -> Exported:
    _check_gives_tensor(model)
    shape = _checked_size(input_size) or default_input_size(model)
    progress = progress or Progress(disable=True)
    task = progress.add_task("write", total=None)
    frozen = _write(model, path, shape, write)
    progress.update(task, total=1, completed=1)
    batches = list(_batches(shape, images))
    try:
        compared = progress.track(batches, description="compare")
        agreement = compare_logits(frozen, load(path), compared)
    except Exception:
        for file in _files(path):
            file.unlink()
        raise
    logits = frozen(torch.zeros(1, *shape)).shape[1:]
    size = sum(file.stat().st_size for file in _files(path))
    return Exported(
        path, size, {"images": ("batch", *shape)}, {"logits": ("batch", *logits)}, agreement
    )


@torch.no_grad()
def _write(model: nn.Module, path: Path, shape: tuple[int, int, int], write: Writer) -> nn.Module:
    """Write the file; gives the copy of the model that it was made from."""
    check_static(model)
    check_not_quantized(model, "export", packed=write is torch.export.save)
    if not path.parent.is_dir():
        raise SettingError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    frozen = copy.deepcopy(model).cpu().float().eval()
    program = trace_model(frozen, shape)
    _forget_paths(program)
    write(program, path)
    return frozen


def trace_model(model: nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """One graph of a model in evaluation mode, for batches of any size of images C×H×W."""
    return torch.export.export(
        model,
        (torch.zeros(2, *shape),),
        dynamic_shapes=({0: torch.export.Dim("batch", max=_MOST)},),
    )


def _forget_paths(program: torch.export.ExportedProgram) -> None:
    """Where in the source each step was: the file is no place for this machine's paths."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _batches(shape: tuple[int, int, int], images: Tensor | None) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for size in BATCH_SIZES:
        yield torch.randn(size, *shape, generator=generator)
    if images is not None:
        yield images.cpu().float()


def _files(path: Path) -> list[Path]:
    """The file, and that of its weights where there is one."""
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]
