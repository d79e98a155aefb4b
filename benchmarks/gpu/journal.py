"""What was found so far, in a file that is whole after every entry, and the time that is left."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

Entry = dict[str, Any]

#: What an entry is of, and the work that finds it.
Task = tuple[Entry, Callable[[], Entry]]


class Journal:
    """Runs tasks until the time is up, and writes each result at once.

    Args:
        path: of the JSON file.
        minutes: when no further task is begun; one that runs is not broken off.
        facts: what all entries depend on.
        report: called with a line about each entry.
    """

    def __init__(
        self, path: Path, minutes: float, facts: Entry, report: Callable[[str], None] = print
    ) -> None:
        self.path, self.report = path, report
        self.begun, self.seconds = monotonic(), 60 * minutes
        self.found: Entry = {"facts": facts, "seconds": 0.0, "left out": []}
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.begun + self.seconds - monotonic()

    def section(self, name: str, tasks: Iterable[Task], needs: float = 0.0) -> None:
        """Do a section's tasks. One that fails says so in its entry; those for which no time is
        left are listed by what they are of.

        Args:
            name: of the section.
            tasks: made one by one; what cannot be made is an entry, too, and ends the section.
            needs: seconds that a task takes, so that it is not begun where fewer are left.
        """
        entries = self.found[name] = []
        for what, work in _made(iter(tasks)):
            if self.left <= needs:
                self.found["left out"].append({"section": name, **what})
                continue
            start = monotonic()
            entry = {**what, **attempted(work), "took_s": round(monotonic() - start, 2)}
            entries.append(entry)
            self.report(f"{name}: {_line(entry)}")
            self._write()
        self._write()

    def _write(self) -> None:
        self.found["seconds"] = round(monotonic() - self.begun, 1)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")
        os.replace(draft, self.path)


def _made(tasks: Iterator[Task]) -> Iterator[Task]:
    while True:
        found: list[Task] = []

        def make(found: list[Task] = found) -> Entry:
            found.extend(islice(tasks, 1))
            return {}

        if failed := attempted(make):
            yield {"task": "cannot be made"}, lambda failed=failed: failed
            return
        if not found:
            return
        yield found[0]


def attempted(work: Callable[[], Entry]) -> Entry:
    """What some work finds, or the error that ended it: a run with one fault tells all else."""
    try:
        return work()
    except Exception as error:  # whatever a driver or a compiler comes up with
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}"[:2000]
        return {"ok": False, "error": text, "where": f"{Path(where.filename).name}:{where.lineno}"}


def _line(entry: Entry) -> str:
    return ", ".join(
        f"{key} {f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in entry.items()
        if not isinstance(value, (list, dict))
    )
