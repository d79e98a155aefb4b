"""What a user can mend: the library's own errors.

Each also derives from ``ValueError`` or ``TypeError``. The command line prints them in one line and
ends with code 2; every other exception is a bug, in the library or in a user's own class, and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenReductionError(Exception):
    """Something that a user can mend; the message says what was wrong, expected, and how."""


class SettingError(TokenReductionError, ValueError):
    """An argument is out of range, or settings do not fit together, or do not fit the model."""


class SettingTypeError(TokenReductionError, TypeError):
    """An argument is of the wrong kind."""


class UnsupportedModelError(TokenReductionError, TypeError):
    """A model whose tokens cannot be reduced, or not by this strategy."""


class FileError(TokenReductionError, ValueError):
    """A file or folder cannot be read or written, or holds something else than it should."""


class DataError(TokenReductionError, ValueError):
    """A data set is missing, cannot be read, or is not what the settings say."""


class TrainingError(TokenReductionError, ValueError):
    """Training cannot go on: its loss is no finite number any more."""


class ReductionError(TokenReductionError, ValueError):
    """A merger or strategy, perhaps a user's own, gave back tokens that cannot be."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a message about an unknown name: those that are spelt nearly so, or nothing.

    Args:
        name: what was given.
        known: what there is.
        most: how many to name.

    >>> did_you_mean("EVit", ["EViT", "DyViT", "TopK"])
    '; did you mean EViT?'
    >>> did_you_mean("warp", ["EViT"])
    ''
    """
    spelt = {one.lower(): one for one in known}
    same = [name.lower()] if name.lower() in spelt else []
    near = same or difflib.get_close_matches(name.lower(), spelt, most, cutoff=0.7)
    return f"; did you mean {' or '.join(spelt[one] for one in near)}?" if near else ""
