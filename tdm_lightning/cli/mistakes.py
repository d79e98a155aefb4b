"""Errors of the library that others have wrapped in theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tdm_lightning.errors import TokenReductionError


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the library's own error where jsonargparse, which builds objects, wrapped it; whatever
    else is raised inside stays as it is.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, TokenReductionError):
            inner = inner.__cause__ or inner.__context__
        if inner is None or inner is error:
            raise
        raise inner from None
