"""The command that measures growth, memory and speed: its tables, its simulated file, runs that are resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import scale  # noqa: E402


def row(part, cells, fovs, score, value, data="simulated"):
    key = part, data, str(cells or ""), "300", str(fovs or ""), "1", "0"
    return dict(zip(scale.KEY, key, strict=True)) | {"code": "c", "score": score, "value": str(value)}


def test_exponents_are_those_of_a_power_law() -> None:
    rows = []
    for cells in (1_000, 3_000, 10_000):
        for power, stage in zip((1.0, 1.1, 2.0, 1.0), scale.STAGES, strict=True):
            rows.append(row("growth", cells, 1, stage, 1e-6 * cells**power))
    page = scale.report(rows)
    assert "| exponent of the time | 1.00 | 1.10 | 2.00 | 1.00 |" in page
    assert "| 1000 | 1.0 |" in page
    assert "fields of view of 200 cells" not in page


def test_the_newer_of_two_runs_counts() -> None:
    rows = [row("step", 0, 0, "step, ms", value, "lung") for value in (5.0, 7.0)]
    page = scale.report(rows)
    assert "**Step**: lung, 300 genes, 1 thread(s), seed 0" in page
    assert "| step, ms | 7 |" in page


def test_slides_in_one_file_have_the_same_genes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scale, "SLIDE_FOVS", 2)
    monkeypatch.setattr(scale, "FOV_CELLS", 30)
    scale.simulate(tmp_path / "tissue.h5ad", 120, 12, 0)
    found = ad.read_h5ad(tmp_path / "tissue.h5ad")
    assert found.shape == (120, 12)
    assert found.obs["slide"].value_counts().to_dict() == {"0": 60, "1": 60}
    assert found.obs.groupby(["slide", "fov"], observed=True).size().tolist() == [30] * 4
    assert found.obsm["spatial"].shape == (120, 2)
    first, second = (found.X[part].toarray() for part in (slice(0, 60), slice(60, 120)))
    assert (first != second).any()
    ratio = (first.sum(axis=0) + 5) / (second.sum(axis=0) + 5)
    assert ratio.max() < 3


def test_runs_are_made_once(tmp_path) -> None:
    command = [sys.executable, str(FOLDER / "scale.py"), "--parts", "tissue", "--cells", "120", "--genes", "12"]
    command += ["--quality", "fast", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "[1/1] tissue simulated, fast 120 12 1 0: done" in first.stdout
    assert "| cells written | 120 |" in first.stdout
    assert "| finite | 1 |" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "done" not in second.stdout
    assert "| cells written | 120 |" in second.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.csv", "tables.md"]


def test_stages_of_growth_are_measured() -> None:
    found = scale.growth(cells=400, genes=20, fovs=2, seed=0)
    assert set(found) == set(scale.STAGES)
    assert min(found.values()) > 0
