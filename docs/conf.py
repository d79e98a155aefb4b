"""How Sphinx makes the manual of these pages: ``python -m sphinx -W --keep-going docs
docs/_build``.
"""

import os
import re
from pathlib import Path

from tdm_lightning.version import __version__

DOCS = Path(__file__).parent

project, author, release = "tdm-lightning", "The tdm-lightning authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True

# Pages link to files of the checkout as GitHub wants it. Outside of `docs/` these are no pages:
# on GitHub's machines the links lead to the repository, elsewhere to the files.
_repository = os.environ.get("GITHUB_REPOSITORY")
_home = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
SOURCE = f"{_home}/{_repository}/blob/main" if _repository else DOCS.parent.resolve().as_uri()
#: Stands for SOURCE in a page that is being read: Markdown takes no links to local files.
MARK = "https://checkout.invalid"

_LINK = re.compile(r"(?<!!)(\[[^\[\]]*\]\()(\.\./[^)\s#]*)")


def lead_out(page: Path, text: str) -> str:
    """Text of a page with its links to what lies outside ``docs/`` made absolute."""

    def absolute(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / found[2]))
        if target.is_relative_to(DOCS):
            return found[0]
        return f"{found[1]}{MARK}/{target.relative_to(DOCS.parent).as_posix()}"

    return _LINK.sub(absolute, text)


def setup(app):
    """What Sphinx calls with itself."""
    from docutils import nodes

    def read(app, name, source):
        source[0] = lead_out(Path(app.env.doc2path(name)), source[0])

    def resolve(app, doctree, name):
        for link in doctree.findall(nodes.reference):
            if link.get("refuri", "").startswith(MARK):
                link["refuri"] = link["refuri"].replace(MARK, SOURCE)

    app.connect("source-read", read)
    app.connect("doctree-resolved", resolve)
