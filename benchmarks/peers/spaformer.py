"""`spaformer_sc.tl.impute` as a method of the benchmark: its defaults, its levels of quality, the paper's preset."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray


def _impute(adata: AnnData, **choices: Any) -> tuple[NDArray[np.float32], str]:
    import spaformer_sc as sf

    task = adata.uns["task"]
    result = sf.tl.impute(
        adata,
        library_key="fov" if "fov" in adata.obs else None,
        missing="missing" if "missing" in adata.layers else None,
        output=task["output"],
        target_sum=task["target_sum"],
        random_state=task["random_state"],
        progress=False,
        copy=True,
        **choices,
    )
    return np.asarray(result.layers["spaformer"], dtype=np.float32), task["output"]


def spaformer(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """The defaults."""
    return _impute(adata)


def spaformer_fast(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """``quality="fast"``."""
    return _impute(adata, quality="fast")


def spaformer_best(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """``quality="best"``."""
    return _impute(adata, quality="best")


def spaformer_paper(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """``preset="paper"``: the configuration of Wen et al. (2023), arXiv 2302.03038."""
    return _impute(adata, preset="paper")


def spaformer_not_pooled(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """``settings={"n_pooled": 0}``: without the counts of cells alike."""
    return _impute(adata, settings={"n_pooled": 0})


def spaformer_no_attention(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """``encoder="mlp"``: no exchange between cells beyond their neighbours' means."""
    return _impute(adata, encoder="mlp")
