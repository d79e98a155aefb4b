"""One file per finished cell, so that a study can be stopped, resumed, and run by several processes
at once.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from tdm_lightning.errors import SettingError

Record = dict[str, Any]


class Store:
    """The cells in a folder.

    Args:
        folder: made if it is missing.
        settings: what all of its cells have in common; a cell made with others is refused.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether the cell is finished.

        Raises:
            ValueError: if it was made with other settings.
        """
        path = self._path(name)
        if not path.exists():
            return False
        made = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if made != self.settings:
            other = sorted(
                key for key in {*made, *self.settings} if made.get(key) != self.settings.get(key)
            )
            listed = ", ".join(
                f"{key}={made.get(key)!r} there, {self.settings.get(key)!r} now" for key in other
            )
            raise SettingError(
                f"{path} was made with other settings ({listed}); choose another folder, or delete"
                " it to redo it"
            )
        return True

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether this process may do the cell: it is not finished and no other process is at it.

        The claim ends with the process, however that ends: a cell that was broken off can be done
        again.
        """
        lock = self.folder / f"{name}.lock"
        try:
            with FileLock(lock, timeout=0):
                yield not self.has(name)
        except Timeout:
            yield False
        else:
            if self.has(name):
                lock.unlink(missing_ok=True)

    def save(self, name: str, record: Record) -> None:
        """Write a finished cell, all of it or nothing."""
        path = self._path(name)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(
            json.dumps({"name": name, **record, "settings": self.settings}, indent=1) + "\n",
            encoding="utf-8",
        )
        os.replace(draft, path)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def load_cells(folder: Path) -> list[Record]:
    """All finished cells in a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def pack_bits(correct: np.ndarray) -> str:
    """Yes and no for N images, as text.

    >>> unpack_bits(pack_bits(np.array([True, False, True])), 3).tolist()
    [True, False, True]
    """
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """:func:`pack_bits` undone, N bool."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(
        bool
    )
