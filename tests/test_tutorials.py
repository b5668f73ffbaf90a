"""Tutorials run from top to bottom, here on small settings, and are committed as they ran."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "tutorials").glob("*.ipynb"))
TINY = {"n_fovs": 3, "n_cells": 80, "n_genes": 45}
SMALL = {
    "1_quick_start": {"QUALITY": "fast", "SIZE": TINY},
    "2_cosmx_lung": {"SIZE": {"n_fovs": 2, "n_cells": 400, "n_genes": 150}},
    "3_xenium_without_fovs": {"SIZE": {"n_fovs": 1, "n_cells": 300, "n_genes": 45}},
    "4_several_slides": {"SIZE": TINY},
    "5_encodings_and_decoders": {"SIZE": TINY, "SETTINGS": {"n_networks": 1, "n_steps": 10}, "SEEDS": [0]},
    "6_notebook_to_cluster": {"SIZE": TINY},
}
"""What is set in place of the parameters of each."""

SHORT = """
from dataclasses import replace
from spaformer_sc import _config

whole = _config.resolve

def short(*args, **kwargs):
    settings = whole(*args, **kwargs)
    return replace(settings, training=replace(settings.training, n_steps=min(20, settings.training.n_steps)))

_config.resolve = short
"""
"""Read by every Python that a tutorial starts: trainings of a few steps."""


@pytest.fixture(params=SMALL)
def notebook(request):
    """One tutorial."""
    nbformat = pytest.importorskip("nbformat", reason="the tutorials extra is not installed")
    path = {path.stem: path for path in TUTORIALS}.get(request.param)
    if path is None:
        pytest.skip("a source distribution has no tutorials")
    return request.param, nbformat.read(path, as_version=4)


def of_kind(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def texts(cell):
    """All that a cell printed or gave back, as text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def test_no_tutorial_is_forgotten():
    assert not TUTORIALS or {path.stem for path in TUTORIALS} == set(SMALL)


def test_tutorials_are_committed_as_they_ran(notebook):
    _, found = notebook
    cells = of_kind(found, "code")
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    figures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert figures
    assert sum(len(o.data["image/png"]) for o in figures) < 2_000_000
    # Nothing of the machine that they ran on: no path from the root, of two folders or more.
    shown = "\n".join(text for cell in cells for text in texts(cell))
    assert not re.search(r"(?<![\w/.:<])/\w[\w.-]*/\w|site-packages|ipykernel", shown)


def test_links_of_tutorials_lead_somewhere(notebook):
    _, found = notebook
    root = TUTORIALS[0].parent
    text = "\n".join(cell.source for cell in of_kind(found, "markdown"))
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (root / target).exists(), target


def test_tutorials_run(notebook, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient", reason="the tutorials extra is not installed")
    pytest.importorskip("ipykernel", reason="the tutorials extra is not installed")
    pytest.importorskip("igraph", reason="the tutorials extra is not installed")
    name, found = notebook
    settings = [cell for cell in of_kind(found, "code") if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == 1
    for parameter, value in SMALL[name].items():
        settings[0].source, n = re.subn(rf"(?m)^{parameter} = .*$", f"{parameter} = {value!r}", settings[0].source)
        assert n == 1
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of other packages about each other
    (tmp_path / "sitecustomize.py").write_text(SHORT)
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    client.NotebookClient(found, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
