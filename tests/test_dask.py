"""Prediction on several processes gives what one process gives, as docs/scale.md shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest

import spaformer_sc as sf

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


@pytest.fixture(scope="module")
def tissue():
    """Five FOVs, so that tasks get one or two, cells of all mixed."""
    adata = sf.datasets.simulated_tissue(n_fovs=5, n_cells=60, n_genes=20)
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


def fitted_to(tissue, **arguments):
    return sf.SpaFormer(
        **{"library_key": "fov", "quality": "fast", "max_epochs": 1, "progress": False, **arguments}
    ).fit(tissue)


@pytest.fixture
def script(tissue, tmp_path, monkeypatch):
    """The example of the page, beside the data that it names."""
    if not PAGE.exists():
        pytest.skip("the page is not part of this distribution")
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    tissue.write_h5ad("slide.h5ad")
    (example,) = re.findall(r"```python\n(import anndata.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = tmp_path / "impute.py"
    path.write_text(example)
    return path


def test_the_example_gives_what_one_process_gives(tissue, script):
    model = fitted_to(tissue, positional="laplacian")
    model.save("model")
    result = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(PAGE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load("imputed.npy"), model.impute(tissue))


@pytest.mark.parametrize(
    "arguments",
    [
        {"tile_size": 50},
        {"positional": ["signnet", "patch", "conditional"], "encoder": "gat"},
        {"preset": "paper"},
        {"settings": {"dispersion": "gene_fov"}},
    ],
    ids=str,
)
def test_every_task_gives_its_part(tissue, script, arguments):
    model = fitted_to(tissue, **arguments)
    model.save("model")
    names = {"__name__": "example"}
    exec(compile(script.read_text(), script, "exec"), names)
    fovs = tissue.obs["fov"].unique()
    with dask.config.set(scheduler="synchronous"):
        parts = dask.compute(*(names["imputed"]([fov]) for fov in fovs))
    found = np.full(tissue.shape, np.nan, dtype=np.float32)
    for fov, (cells, values) in zip(fovs, parts, strict=True):
        assert (tissue.obs["fov"].iloc[cells] == fov).all()
        found[cells] = values
    np.testing.assert_array_equal(found, model.impute(tissue))


def test_every_field_of_a_fit_with_missing_entries_gives_its_part(tissue):
    missing = np.zeros(tissue.shape, dtype=bool)
    missing[(tissue.obs["fov"].isin(tissue.obs["fov"].unique()[:2])).to_numpy(), 3:9] = True
    tissue = tissue.copy()
    tissue.layers["not measured"] = missing
    model = fitted_to(tissue, missing="not measured")
    whole, latent = model.impute(tissue, output="counts"), model.embed(tissue)
    for fov in tissue.obs["fov"].unique():
        cells = np.flatnonzero(tissue.obs["fov"] == fov)
        np.testing.assert_array_equal(model.impute(tissue[cells], output="counts"), whole[cells])
        np.testing.assert_array_equal(model.embed(tissue[cells]), latent[cells])
