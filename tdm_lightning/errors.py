"""What a user can mend: the library's own errors.

Each also derives from ``ValueError`` or ``TypeError``. The command line prints them in one line and
ends with code 2; every other exception is a bug, in the library or in a user's own class, and keeps
its traceback.
"""

from __future__ import annotations


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


class ReductionError(TokenReductionError, ValueError):
    """A merger or strategy, perhaps a user's own, gave back tokens that cannot be."""
