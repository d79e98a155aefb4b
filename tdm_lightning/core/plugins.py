"""Strategies, mergers and adapters of others, found by entry points."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import entry_points

#: A distribution that offers some names the modules that define them under this group.
GROUP = "tdm_lightning.plugins"


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Import the modules of all plugins that are installed, once; importing registers classes.

    One that cannot be imported is skipped, with a warning that names it and the reason.

    Returns:
        The names of those that were imported.
    """
    loaded = []
    for point in entry_points(group=GROUP):
        try:
            point.load()
        # Whatever a foreign module raises, the others are wanted.
        except Exception as error:  # noqa: PERF203
            warnings.warn(
                f"the plugin {point.name!r} ({point.value}) was left out: importing it raised"
                f" {type(error).__name__}: {error}",
                stacklevel=2,
            )
        else:
            loaded.append(point.name)
    return tuple(loaded)
