"""``python -m benchmarks.scenes``: make the set of scenes from Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray

from benchmarks.runner import run
from benchmarks.scenes.split import draw_scenes, read_garments
from tdm_lightning.visualize.sheet import make_folder


def scenes(
    garments: str = "zalando-datasets/fashion_mnist",
    out: str = "scenes",
    train: int = 20_000,
    validation: int = 4_000,
    test: int = 6_000,
    seed: int = 0,
) -> list[Path]:
    """Draw scenes of 56×56 pixels and write a parquet file for each split.

    The label is the class of the whole garment. No garment, and no piece of one, is in two splits:
    validation scenes show the last 5,000 of Fashion-MNIST's training files, test scenes its test
    files. A scene depends on the seed, its split and its number alone.

    Args:
        garments: Fashion-MNIST: a folder with its files, or its name on the hub.
        out: folder to write.
        train: scenes to fine-tune on.
        validation: scenes to choose by.
        test: scenes to report on.
        seed: of everything random.

    Returns:
        The files.

    Raises:
        ValueError: if the set is not there, or too small.
    """
    folder, written = make_folder(out), []
    counts = {"train": train, "validation": validation, "test": test}
    for split, found in read_garments(garments).items():
        names = [str(index) for index in range(int(found.labels.max()) + 1)]
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        rows = [
            {"image": fromarray(scene.image), "label": scene.label}
            for scene in draw_scenes(found, 0, counts[split], seed)
        ]
        path = folder / f"{split}.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
        written.append(path)
        print(path)
    return written


if __name__ == "__main__":
    run(scenes)
