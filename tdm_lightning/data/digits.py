"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL.Image import fromarray

from tdm_lightning.errors import DataError

_TEST, _VALIDATION = 360, 180  # a fifth and a tenth of the images
_SEED = 0  # fixed: runs with different seeds are compared on the same test images


def load_digits_splits() -> DatasetDict:
    """The 1797 grey 8×8 digits as ``train``, ``validation`` and ``test`` (1257, 180, 360 images),
    stratified, always the same.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "dataset 'digits' needs scikit-learn: pip install 'tdm-lightning[quickstart]'"
        ) from error
    bunch = load_digits()
    rest, test = train_test_split(
        range(len(bunch.target)), test_size=_TEST, stratify=bunch.target, random_state=_SEED
    )
    train, val = train_test_split(
        rest, test_size=_VALIDATION, stratify=bunch.target[rest], random_state=_SEED
    )
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the values are 0…16
    features = Features(
        {"image": Image(), "label": ClassLabel(names=[str(name) for name in bunch.target_names])}
    )

    def split(indices: list[int]) -> Dataset:
        columns = {
            "image": [fromarray(grey[index]) for index in indices],
            "label": bunch.target[indices],
        }
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(train=split(train), validation=split(val), test=split(test))
