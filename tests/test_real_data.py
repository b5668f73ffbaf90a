"""Short runs on real data; skipped where they are not there."""

from __future__ import annotations

import anndata as ad
import numpy as np

import spaformer_sc as sf
from tests.conftest import contents


def test_cosmx(data_folder):
    adata = ad.read_h5ad(data_folder / "cosmx_nsclc_profast.h5ad")
    adata = adata[np.arange(adata.n_obs) % 3 == 0].copy()
    before = contents(adata)
    sf.tl.impute(adata, library_key="fov", max_epochs=6, progress=False)
    assert {place: contents(adata)[place] for place in before} == before
    record = adata.uns["spaformer"]
    assert record["params"]["graph_summary"]["n_fovs"] == 2
    assert record["scores"]["gain"] > 0.05
    assert record["history"]["validation"][-1] > record["history"]["validation"][0]
    assert np.isfinite(adata.layers["spaformer"]).all()
    assert (adata.var["spaformer_gain"] > 0).mean() > 0.4
    filled = np.asarray(adata.X.sum(axis=1)).ravel() > 0
    assert np.count_nonzero(adata.layers["spaformer"][filled]) / adata[filled].layers["spaformer"].size > 0.99


def test_xenium_has_no_fov_and_is_tiled(data_folder):
    whole = ad.read_h5ad(data_folder / "xenium_mouse_brain.h5ad", backed="r")
    xy = whole.obsm["spatial"]
    cells = np.argsort(np.linalg.norm(xy - np.median(xy, axis=0), axis=1))[:3000]
    adata = whole[np.sort(cells)].to_memory()
    whole.file.close()
    sf.tl.impute(adata, max_epochs=4, tile_size=1000, progress=False, output="rate", target_sum=100)
    record = adata.uns["spaformer"]
    assert record["params"]["graph_summary"]["n_fovs"] == 1
    assert record["params"]["graph_summary"]["n_tiles"] == 3
    assert record["scores"]["gain"] > 0.05
    np.testing.assert_allclose(adata.layers["spaformer"].sum(axis=1), 100, rtol=1e-4)
