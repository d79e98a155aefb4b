"""What goes wrong around a run: the disk, the process, its workers, its data, its folders."""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tdm_lightning as tdm
from tdm_lightning import ImageNetDataModule
from tdm_lightning.cli import main
from tdm_lightning.errors import DataError, FileError
from tests.helpers.localsets import (
    encode,
    make_arrow,
    make_image_folder,
    make_parquet,
    make_webdataset,
)
from tests.training.test_resume import Watch, after, fit, make_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_arrow(tmp_path_factory.mktemp("set"), per_class=8, size=24))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, images):
    watch = Watch()
    fit(tmp_path_factory.mktemp("whole"), make_data(images), watch)
    return watch.losses


class Steadily(Watch):
    """Keeps the last step's checkpoint, and tells how many steps are done."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        (self.folder / "steps").write_text(str(trainer.global_step))


def run_in(folder, images):
    """What a process of its own runs."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    fit(folder, make_data(images), Steadily(folder))


def started(folder, images, **environment):
    code = "from tests.training.test_faults import run_in; from pathlib import Path;"
    code += f" run_in(Path({str(folder)!r}), {images!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


def resumed_from(folder, images, tmp_path):
    """The losses from the last checkpoint on, and the step that it was made at."""
    path = folder / "last.ckpt"
    step = torch.load(path, weights_only=True)["global_step"]
    watch = Watch()
    fit(tmp_path, make_data(images), watch, path)
    return watch.losses, step


# The process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_run_that_is_ended_at_any_moment_goes_on(tmp_path, images, uninterrupted, kind):
    draw = random.Random(int(kind))
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process, moment = started(folder, images), draw.randrange(2, 14)
        give_up = time.monotonic() + 120
        while not (folder / "steps").exists() or int((folder / "steps").read_text() or 0) < moment:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.002)
        time.sleep(draw.random() / 20)  # in the middle of a step, or of writing
        process.send_signal(kind)
        assert process.wait(60) != 0
        losses, step = resumed_from(folder, images, tmp_path)
        assert step >= moment
        assert losses == after(uninterrupted, step)


def test_two_runs_in_one_folder_leave_a_whole_checkpoint(tmp_path, images, uninterrupted):
    both = [started(tmp_path, images, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert [process.wait(120) for process in both] == [0, 0], (tmp_path / "log").read_text()
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == len(uninterrupted)


def test_the_clock_and_other_random_numbers_play_no_part(
    tmp_path, images, uninterrupted, monkeypatch
):
    clock, watch = time.time, Watch()
    monkeypatch.setattr(time, "time", lambda: clock() + 3e8)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    fit(tmp_path, make_data(images), watch)
    assert watch.losses == uninterrupted


class Deadly(ImageNetDataModule):
    """Its second image ends the process that loads it, as the system does where memory runs out."""

    def train_transform(self):
        transform, seen = super().train_transform(), []

        def once(image):
            seen.append(1)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return transform(image)

        return once


def test_a_worker_that_dies_is_named(tmp_path, images):
    settings = {"model": "deit_tiny_patch16_224", "batch_size": 4, "num_workers": 1}
    data = Deadly(images, cache_dir=images, model_kwargs={"img_size": 16}, **settings)
    with pytest.raises(DataError, match="a process that loads images died: .*num_workers") as told:
        fit(tmp_path, data, Watch())
    assert "\n" not in str(told.value)


# The disk -------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk():
    """No file grows beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, images, uninterrupted):
    class Filling(Steadily):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with full_disk() if trainer.global_step == 9 else contextlib.nullcontext():
                super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    with pytest.raises(OSError, match="too large"):
        fit(tmp_path, make_data(images), Filling(tmp_path))
    losses, step = resumed_from(tmp_path, images, tmp_path)
    assert step == 8
    assert losses == after(uninterrupted, 8)


def test_a_disk_that_fills_while_a_checkpoint_is_copied_there(
    tmp_path, images, uninterrupted, monkeypatch
):
    """Where the temporary folder is on another disk, a move is a copy."""

    def another_disk(source, target):
        raise OSError(errno.EXDEV, "another disk", source, None, target)

    def half_of_it(source, target, **options):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device", target)

    class Filling(Steadily):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 9:
                monkeypatch.setattr(os, "rename", another_disk)
                monkeypatch.setattr(shutil, "copyfile", half_of_it)
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, make_data(images), Filling(tmp_path))
    monkeypatch.undo()
    losses, step = resumed_from(tmp_path, images, tmp_path)
    assert losses == after(uninterrupted, 8)
    assert step == 8
    assert not list(tmp_path.glob("*.part"))


def test_a_model_is_not_shared_to_where_nothing_can_be_written(tmp_path):
    import timm

    model = tdm.attach(timm.create_model("test_vit"), tdm.TDM(0.5, (1,)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=r"cannot be written to .*file: .*exists"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(FileError, match=r"cannot be written to .*file/under: .*directory"):
        model.save_pretrained(tmp_path / "file" / "under")
    with full_disk(), pytest.raises(FileError, match=r"cannot be written to .*full: "):
        model.save_pretrained(tmp_path / "full")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_only_be_read(tmp_path):
    import timm

    tmp_path.chmod(0o500)
    model = tdm.attach(timm.create_model("test_vit"), tdm.TDM(0.5, (1,)))
    with pytest.raises(FileError, match="cannot be written to .*denied"):
        model.save_pretrained(tmp_path / "new")


# The loss -------------------------------------------------------------------------------------


def test_the_command_ends_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.max_steps=9"]
    settings += ["--trainer.enable_progress_bar=false", "--model.warmup_epochs=0"]
    arguments = ["fit", "--config=quickstart", "--model.lr=1e30", *settings]
    monkeypatch.setattr(sys, "argv", ["tdm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert line.startswith("tdm fit: error: the loss is not finite in step ")


# The data -------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def png_folder(root):
    make_image_folder(root)
    for index, path in enumerate(sorted((root / "validation").rglob("*.jpg"))):
        path.write_bytes(encode(index // 6, index, suffix="png"))
        path.rename(path.with_suffix(".png"))
    cut(root / "validation" / "bee" / "2.png")
    return root


def jpeg_folder(root):
    make_image_folder(root)
    cut(root / "validation" / "bee" / "2.jpg")
    return root


def spoiled_bytes(root, make):
    """One image's bytes changed where they lie in the file."""
    make(root)
    (path,) = [path for path in sorted(root.rglob("*0000*")) if "validation" in str(path)][:1]
    content, image = path.read_bytes(), encode(1, 2)
    assert content.count(image) == 1
    path.write_bytes(content.replace(image, bytes(len(image))))
    return root


CORRUPT = {
    "PNG": (png_folder, r"image 8, .*bee/2.png, of split 'validation'"),
    "JPEG": (jpeg_folder, r"image 8, .*bee/2.jpg, of split 'validation'"),
    "webdataset": (
        lambda root: spoiled_bytes(root, lambda root: make_webdataset(root, shards=1)),
        r"image 7.* of split 'validation'",
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", CORRUPT)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, name, workers):
    make, expected = CORRUPT[name]
    columns = {"image_column": "jpg", "label_column": "cls"} if name == "webdataset" else {}
    data = ImageNetDataModule(
        str(make(tmp_path / "set")),
        model="test_vit",
        num_workers=workers,
        max_corrupt_images=0,
        cache_dir=str(tmp_path / "cache"),
        **columns,
    )
    data.setup("validate")
    with pytest.raises(DataError, match=f"^{expected} cannot be decoded .*max_corrupt") as told:
        list(data.val_dataloader())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "webdataset"])
def test_a_file_that_is_cut_off_is_named(tmp_path, kind):
    make = {"parquet": make_parquet, "arrow": make_arrow, "webdataset": make_webdataset}[kind]
    root = make(tmp_path / "set")
    for path in root.rglob("*.*"):
        if path.suffix in (".parquet", ".arrow", ".tar"):
            path.write_bytes(path.read_bytes()[:1000])
    columns = {"image_column": "jpg", "label_column": "cls"} if kind == "webdataset" else {}
    data = ImageNetDataModule(
        str(root), model="test_vit", num_workers=0, cache_dir=str(tmp_path / "cache"), **columns
    )
    with pytest.raises(DataError, match="cannot read .*set") as told:
        data.setup("fit")
    assert "\n" not in str(told.value)


def idx(folder, images=4, cut=0):
    for prefix in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + np.array([images, 28, 28], ">u4").tobytes()
        content = head + bytes(images * 28 * 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(content[: len(content) - cut])
        head = bytes([0, 0, 8, 1]) + np.array([images], ">u4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + bytes(range(images)))


@pytest.mark.parametrize("cut", [1, 784, 4 * 784 + 2])
def test_idx_files_that_are_cut_off_are_named(tmp_path, cut):
    idx(tmp_path, cut=cut)
    data = ImageNetDataModule(str(tmp_path), model="test_vit", num_workers=0, test_split="test")
    with pytest.raises(DataError, match="train-images-idx3-ubyte' (should hold|is no IDX)"):
        data.setup("fit")


# Folders --------------------------------------------------------------------------------------


def test_a_folder_of_images_that_links_to_itself(tmp_path):
    root = make_image_folder(tmp_path / "set")
    (root / "train" / "ant" / "again").symlink_to(root / "train", target_is_directory=True)
    (root / "train" / "ant" / "9.jpg").symlink_to(root / "train" / "ant" / "9.jpg")
    data = ImageNetDataModule(
        str(root), model="test_vit", num_workers=0, cache_dir=str(tmp_path / "cache")
    )
    data.setup("fit")
    assert data.num_classes == 3


def test_spaces_and_letters_of_all_scripts_in_every_path(tmp_path, monkeypatch, capsys):
    place = tmp_path / "Läufe und 模型 = 1"
    place.mkdir()
    monkeypatch.chdir(place)
    root = make_image_folder(place / "Bilder für später", size=24)
    given = ["--config=quickstart", f"--data.dataset={root}", "--data.val_split=validation"]
    given += ["--data.test_split=validation", f"--data.cache_dir={place / 'zwischen lager'}"]
    given += ["--data.num_workers=0", "--model.warmup_epochs=0", "--trainer.max_epochs=1"]
    given += ["--trainer.check_val_every_n_epoch=1"]
    given += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    given += ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=ein Ordner é"]
    main(["fit", *given])
    main(["fit", *given])  # beside the first one's
    first, second = sorted((place / "ein Ordner é").iterdir())
    assert first.read_bytes() != b""
    main(["test", *given, f"--ckpt_path={second}"])
    out = place / "geteilt 模"
    main(["export", f"--weights={first}", "--format=hub", f"--out={out}"])
    assert tdm.TokenReducedViT.from_pretrained(out).num_classes == 3
