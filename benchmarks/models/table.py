"""The table of what can be done with each class of models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from textwrap import wrap

from tdm_lightning.cli.models import LIBRARIES, library_of
from tdm_lightning.vit.refusals import REFUSED

_ABOUT = """# What works with which model

Made by `python -m benchmarks.models` with {versions}: a model of four small blocks of each class,
random weights, `WardTDM(0.5, (1, 2))`.

- *forward*: at keep rate 1 the plain model's output, below it another and finite one;
- *train*: gradients for all parameters that have one in the plain model;
- *half*: finite in bfloat16;
- *compile*: one graph of `torch.compile`, without a break (traced, not lowered to C++);
- *export*, *onnx*: `torch.export` and ONNX Runtime, for batches of another size too (a masked
  autoencoder draws the order of its patches, and another one there);
- *trace*: what became of every patch.

"""
_REFUSED = """
Classes of timm that are called Vision Transformers too, and are refused:

"""


def markdown(found: Mapping[str, Mapping[str, str]]) -> str:
    """The page.

    Args:
        found: by the full name of the class, the outcome of each trial by its name.
    """
    packages = ("torch", *(library.package for library in LIBRARIES))
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    trials = [*next(iter(found.values()))]
    lines = [
        f"| library | class | {' | '.join(trials)} |",
        f"|---|---|{'---|' * len(trials)}",
    ]
    remarks = []
    for path, outcomes in found.items():
        library, name = library_of(path), path.rpartition(".")[2]
        assert library is not None
        cells = ["yes" if outcome == "yes" else "no" for outcome in outcomes.values()]
        lines.append(f"| {library.name} | `{name}` | {' | '.join(cells)} |")
        remarks += [
            f"- `{name}`, {trial}: {outcome}"
            for trial, outcome in outcomes.items()
            if outcome != "yes"
        ]
    refused = [f"- `{name}`: {reason}" for name, reason in REFUSED.items()]
    why = ["", *map(_wrapped, remarks)] if remarks else []
    listed = "\n".join(map(_wrapped, refused))
    about = "\n".join(map(_wrapped, _ABOUT.format(versions=versions).split("\n")))
    return about + "\n".join([*lines, *why]) + "\n" + _REFUSED + listed + "\n"


def _wrapped(line: str) -> str:
    """A line in lines of at most 100 columns."""
    inside = "  " if line.startswith("- ") else ""
    return "\n".join(wrap(line, 100, break_on_hyphens=False, subsequent_indent=inside))
