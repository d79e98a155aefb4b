"""Pictures of a foreign run."""

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tdm_lightning.callbacks import TokenVisualizer

import tdm_lightning as tdm
from tests.callbacks.foreign import Foreign, loader, small_vit, trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_pictures_of_validation_and_test(tmp_path, form):
    run = trainer(tmp_path, TokenVisualizer(num_images=3, every_n_epochs=2), max_epochs=4)
    net = Foreign(tdm.attach(small_vit(), tdm.TDM(0.5, layers=(1, 2))))
    run.fit(net, loader(), loader(batch_size=2, form=form))
    assert names(tmp_path / "tokens") == [
        f"val_epoch00{epoch}_{index}.png" for epoch in (1, 3) for index in range(3)
    ]
    run.test(net, loader(form=form), verbose=False)
    run.validate(net, loader(form=form), verbose=False)
    later = [name for name in names(tmp_path / "tokens") if "epoch" not in name]
    assert later == [f"{stage}_{index}.png" for stage in ("test", "val") for index in range(3)]
    sheet = Image.open(tmp_path / "tokens" / "test_0.png")
    assert sheet.width > 4 * 448
    assert sheet.height > 2 * 448


def test_pictures_show_the_images_as_they_were(tmp_path):
    vit = small_vit()
    vit.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.1, 0.1)}
    data = loader(1)
    data.dataset[0][1].zero_()  # the mean colour
    folder = tmp_path / "mine"
    trainer(tmp_path, TokenVisualizer(dir=str(folder))).validate(Foreign(vit), data, verbose=False)
    assert names(folder) == ["val_0.png"]
    pixels = np.asarray(Image.open(folder / "val_0.png").convert("RGB"))
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    assert middle.tolist() == [51, 102, 153]


def test_half_precision_weights(tmp_path):
    net = Foreign(tdm.attach(small_vit(), tdm.TDM(0.5, layers=(1,))))
    trainer(tmp_path, TokenVisualizer(1), precision="bf16-true").validate(
        net, loader(), verbose=False
    )
    assert names(tmp_path / "tokens") == ["val_0.png"]


def test_loggers_that_take_images_get_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path, name="", version="board")
    loggers = [CSVLogger(tmp_path, name="", version="csv"), board]
    net = Foreign(tdm.attach(small_vit(), tdm.TDM(0.5, layers=(1,))))
    trainer(tmp_path, TokenVisualizer(2), logger=loggers).validate(net, loader(), verbose=False)
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["images"] == ["tokens/val_0", "tokens/val_1"]
    assert (tmp_path / "csv" / "tokens" / "val_1.png").exists()


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    visualizer = TokenVisualizer(dir=str(tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match="cannot write to the folder"):
        trainer(tmp_path, visualizer).fit(Foreign(small_vit()), loader(), loader())


@pytest.mark.parametrize("settings", [{"num_images": 0}, {"every_n_epochs": 0}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="at least 1"):
        TokenVisualizer(**settings)
