"""From a name or a path to a set's splits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path
from tarfile import TarError
from typing import Any, TypeAlias

from datasets import DatasetDict, Features, IterableDatasetDict, load_dataset, load_dataset_builder
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.errors import GatedRepoError

from tdm_lightning.core.checks import check_choice
from tdm_lightning.data.digits import load_digits_splits
from tdm_lightning.data.idx import is_idx_file, load_idx_splits
from tdm_lightning.errors import DataError

Location: TypeAlias = str | list[str] | dict[str, str | list[str]]
Splits: TypeAlias = DatasetDict | IterableDatasetDict

FORMATS = ("hub", "imagefolder", "parquet", "arrow", "webdataset", "idx", "digits")
_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"} | dict.fromkeys(
    ImageFolder.EXTENSIONS, "imagefolder"
)
#: Names of folders that ``datasets`` takes for splits.
_SPLIT_FOLDERS = {
    *("train", "training", "validation", "valid", "dev", "val"),
    *("test", "testing", "eval", "evaluation"),
}
_STREAM_SHARDS = 4  # of a set in memory: enough for a few workers


def load_splits(
    location: Location,
    format: str | None = None,
    name: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Splits:
    """Download or prepare a set and give all its splits.

    Args:
        location: name on the Hugging Face hub, a folder, files or glob patterns of files, those by
            split, or ``"digits"``.
        format: one of :data:`FORMATS`; ``None``: see :func:`detect_format`.
        name: configuration of a set on the hub.
        streaming: read while iterating, without preparing a copy first.
        cache_dir: where copies are kept; ``None``: datasets' own place.

    Raises:
        ValueError: if there is nothing at this place, it cannot be read as this format, or access
            is refused.
    """
    format = detect_format(location) if format is None else check_choice(format, FORMATS, "format")
    if format in ("digits", "idx"):
        splits = load_digits_splits() if format == "digits" else load_idx_splits(_folder(location))
        return _to_streams(splits) if streaming else splits
    options = {"streaming": streaming, "cache_dir": cache_dir}
    if format == "hub":
        return _load_from_hub(load_dataset, location, name, **options)
    files = _files(location, format)
    if format == "imagefolder":
        # By itself it would leave the labels out where it finds a single class.
        options["drop_labels"] = isinstance(location, str) and not _has_classes(location)
    try:
        return load_dataset(format, **files, **options)
    except (DatasetsError, OSError, ValueError, TarError) as error:
        raise DataError(
            f"cannot read {location!r} as {format}: {error.__cause__ or error}"
        ) from error


def hub_features(
    location: Location, format: str | None, name: str | None, cache_dir: str | None
) -> Features | None:
    """The columns of a set on the hub, before its images are there; ``None`` where its page does
    not tell, and for others.

    Raises:
        ValueError: as :func:`load_splits`.
    """
    if (format or detect_format(location)) != "hub":
        return None
    return _load_from_hub(load_dataset_builder, location, name, cache_dir=cache_dir).info.features


def detect_format(location: Location) -> str:
    """What a location holds, by the first file found there; a name that is no local path is one on
    the hub.

    Raises:
        ValueError: if it is a path and there is nothing, or nothing known.

    >>> detect_format("ILSVRC/imagenet-1k")
    'hub'
    """
    if location == "digits":
        return "digits"
    if isinstance(location, str) and not _is_local(location):
        return "hub"
    patterns = list(_patterns(location))
    for pattern in patterns:
        for file in _matches(pattern):
            known = "idx" if is_idx_file(file) else _SUFFIXES.get(Path(file).suffix.lower())
            if known is not None and not Path(file).name.startswith("metadata."):
                return known
    found = ", ".join(map(repr, patterns))
    raise DataError(
        f"{found}: no images, .parquet, .arrow, .tar or IDX files there; a folder of images is laid"
        f" out {_LAYOUT}"
    )


_LAYOUT = "SPLIT/CLASS/IMAGE, such as train/cat/1.jpg and validation/cat/2.jpg"


def _folder(location: Location) -> str:
    if not isinstance(location, str):
        raise DataError(f"format 'idx' takes one folder, got {location!r}")
    return location


def _is_local(location: str) -> bool:
    looks_local = (
        location.startswith((".", "~", os.sep))
        or "://" in location
        or "\\" in location
        or location.count("/") > 1
    )
    return (
        looks_local
        or has_magic(location)
        or Path(location).suffix in _SUFFIXES
        or Path(location).exists()
    )


def _patterns(location: Location) -> Iterator[str]:
    if isinstance(location, Mapping):
        for patterns in location.values():
            yield from _patterns(patterns)
    else:
        yield from [location] if isinstance(location, str) else location


def _matches(pattern: str) -> Iterable[str]:
    """The files that a pattern means, or those in a folder; what lies elsewhere is taken as
    given.
    """
    if "://" in pattern:
        return [pattern]
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        return (
            os.path.join(folder, file)
            for folder, _, files in os.walk(path)
            for file in sorted(files)
        )
    files = sorted(glob(path, recursive=True))
    if not files:
        what = "no file matches this pattern" if has_magic(pattern) else "no such file or folder"
        raise DataError(
            f"{pattern!r}: {what}; expected a folder, .parquet, .arrow or .tar files, or a name on"
            " the hub"
        )
    return files


def _files(location: Location, format: str) -> dict[str, Any]:
    """The arguments by which ``load_dataset`` finds local files."""
    for pattern in _patterns(location):
        _matches(pattern)
    if isinstance(location, Mapping):
        return {"data_files": {split: _expand(patterns) for split, patterns in location.items()}}
    folder = os.path.expanduser(location) if isinstance(location, str) else ""
    if not os.path.isdir(folder):
        return {"data_files": _expand(location)}
    if format == "imagefolder":
        return {"data_dir": folder}
    return {"data_files": _files_by_split(folder, format)}


def _has_classes(location: str) -> bool:
    """Whether the images of a folder lie in folders of classes, below those of splits; what is no
    folder is taken to have some.
    """
    folder = Path(os.path.expanduser(location))
    if not folder.is_dir():
        return True
    for file in map(Path, _matches(str(folder))):
        if file.suffix.lower() in ImageFolder.EXTENSIONS:
            parts = file.relative_to(folder).parts[:-1]
            if parts[1:] or set(parts) - _SPLIT_FOLDERS:
                return True
    return False


def _files_by_split(folder: str, format: str) -> dict[str, list[str]]:
    """The files of one format, by the splits that ``datasets`` sees in the names of folders and
    files.
    """
    suffixes = [suffix for suffix, known in _SUFFIXES.items() if known == format]
    if not any(Path(file).suffix in suffixes for file in _matches(folder)):
        raise DataError(
            f"{folder!r}: no {' or '.join(suffixes)} files there, which format {format!r} expects"
        )
    patterns = sanitize_patterns(get_data_patterns(folder))
    found = DataFilesDict.from_patterns(patterns, base_path=folder, allowed_extensions=suffixes)
    return {split: list(files) for split, files in found.items() if files}


def _expand(patterns: str | list[str]) -> list[str]:
    paths = (
        os.path.expanduser(pattern)
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    )
    return [os.path.join(path, "**") if os.path.isdir(path) else path for path in paths]


def _to_streams(splits: DatasetDict) -> IterableDatasetDict:
    return IterableDatasetDict(
        {
            name: split.to_iterable_dataset(num_shards=_STREAM_SHARDS)
            for name, split in splits.items()
        }
    )


def _load_from_hub(
    function: Callable[..., Any], location: Location, name: str | None, **options: Any
) -> Any:
    """Load from the hub; a refusal says how to mend it."""
    if not isinstance(location, str):
        raise DataError(f"format 'hub' takes the name of one data set, got {location!r}")
    try:
        return function(location, name, **options)
    except (DatasetsError, OSError) as error:  # the hub's own errors are OSErrors
        raise DataError(_hub_error_message(error, location)) from error


def _hub_error_message(error: Exception, name: str) -> str:
    if (
        isinstance(error, GatedRepoError)
        or isinstance(error.__cause__, GatedRepoError)
        or "gated" in str(error)
    ):
        return (
            f"the data set {name!r} is gated and access was refused: accept its terms at"
            f" https://huggingface.co/datasets/{name}, then log in with `hf auth login` (or set"
            " HF_TOKEN); a local copy can be given as a path instead"
        )
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{name!r} is neither a file or folder here nor a data set you can see on the Hugging"
            " Face hub; check the name, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, ConnectionError):
        return (
            f"the data set {name!r} is neither a file or folder here nor in the cache, and the"
            f" Hugging Face hub cannot be reached ({error}); check the network, or give a local"
            " path"
        )
    return f"cannot load the data set {name!r}: {error.__cause__ or error}"
