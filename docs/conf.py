"""How the documentation is built; ``scripts/docs.sh`` does it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import NumpyDocstring

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from spaformer_sc import __version__  # noqa: E402

project = "spaformer_sc"
author = "the spaformer_sc developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

# --- pages -----------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tutorials are committed with their outputs
copybutton_exclude = ".linenos, .gp, .go"

# --- docstrings ------------------------------------------------------------------------------------------------------

default_role = "literal"
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
napoleon_google_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

# Links into other packages need their inventories, which are fetched; a build has to work without the network.
if {"READTHEDOCS", "SPAFORMER_SC_DOCS_ONLINE"} & os.environ.keys():
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "matplotlib": ("https://matplotlib.org/stable", None),
        "anndata": ("https://anndata.readthedocs.io/en/stable", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

# --- HTML ------------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = f"spaformer_sc {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "show_navbar_depth": 1, "navbar_persistent": []}


def _prose_returns(self: NumpyDocstring, section: str) -> list[str]:
    """Take a Returns section as it is written: prose, then the fields that are set as a definition list."""
    return [*self._format_block(":returns: ", self._dedent(self._consume_to_next_section())), ""]


NumpyDocstring._parse_returns_section = _prose_returns


def _short_types(app: Any, *_: Any) -> None:
    """Write the types of arrays as they are in the code."""
    for hints in app.env.current_document.autodoc_annotations.values():
        for name, hint in hints.items():
            hints[name] = re.sub(r"[~\w.]*ndarray\[.*?dtype\[[~\w.]*?(\w+)\]\]", r"NDArray[\1]", hint)


def _within_the_pages(app: Any, name: str, source: list[str]) -> None:
    """Let links that hold in the repository hold in the pages, where some files have another place."""
    text = source[0].replace("](../benchmarks/README.md", "](benchmarks.md").replace("](../tutorials/", "](tutorials/")
    if name.startswith("tutorials/"):
        text = text.replace("](../docs/", "](../").replace("](../CONTRIBUTING.md", "](../contributing.md")
    if name.endswith("/tables") and not text.startswith("# "):  # as a benchmark printed them
        text = f"# All figures: {name.split('/')[0]}\n\n{text}"
    if name == "tutorials" and not any((HERE / "tutorials").iterdir()):  # as in a source distribution
        text = "# Tutorials\n\nThey are in the repository, in `tutorials`."
    source[0] = text


def setup(app: Any) -> None:
    """Bring the tutorials to where Sphinx finds them."""
    shutil.rmtree(HERE / "tutorials", ignore_errors=True)
    (HERE / "tutorials").mkdir()
    for notebook in (ROOT / "tutorials").glob("*.ipynb"):
        shutil.copy2(notebook, HERE / "tutorials")
    app.connect("source-read", _within_the_pages)
    app.connect("object-description-transform", _short_types, priority=400)
