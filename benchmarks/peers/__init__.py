"""Imputation methods behind one call, so that the benchmark, and anybody's own script, can treat them alike.

A method is a function ``impute(adata) -> (prediction, scale)``. It reads

- ``adata.X``: visible counts, CSR, cells × genes;
- ``adata.obsm["spatial"]``: position of every cell; ``adata.obs["fov"]``: its field of view, where there are any;
- ``adata.layers["missing"]``: boolean array, cells × genes, true where an entry was hidden (and ``X`` is 0); absent
  where nothing was;
- ``adata.uns["task"]``: ``"protocol"`` (``"thinning"``, ``"entries"`` or ``"blocks"``), ``"output"`` (the scale that is
  scored, ``"rate"`` or ``"lognorm"``), ``"target_sum"``, ``"random_state"`` and ``"scratch"`` (folder in which methods
  may leave what others can use on the same input, or None).

It returns a float32 array, cells × genes, and its scale: ``"rate"`` (proportional, within a cell, to expected counts),
``"counts"`` (expected counts at the cell's full depth) or ``"lognorm"`` (log1p(count / full depth × target_sum)).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Imputer = Callable[[Any], tuple[NDArray[np.float32], str]]

METHODS: dict[str, str] = {
    "gene_mean": "means:gene_mean",
    "fov_gene_mean": "means:fov_gene_mean",
    "spatial_knn_mean": "means:spatial_knn_mean",
    "expression_knn": "knn:expression_knn",
    "joint_knn": "knn:joint_knn",
    "truncated_svd": "low_rank:truncated_svd",
    "kl_nmf": "low_rank:kl_nmf",
    "ridge": "linear:ridge",
    "poisson_glm": "linear:poisson_glm",
    "blend": "blend:blend",
    "alra": "alra:alra",
    "magic": "magic:magic",
    "scvi": "scvi:scvi",
    "resolvi": "scvi:resolvi",
    "masked_mlp": "mlp:masked_mlp",
    "masked_mlp_neighbours": "mlp:masked_mlp_neighbours",
    "spaformer": "spaformer:spaformer",
    "spaformer_fast": "spaformer:spaformer_fast",
    "spaformer_best": "spaformer:spaformer_best",
    "spaformer_paper": "spaformer:spaformer_paper",
    "spaformer_not_pooled": "spaformer:spaformer_not_pooled",
    "spaformer_no_attention": "spaformer:spaformer_no_attention",
}
"""Name of each method and where it is, ``module:function`` within this package; imported when it is loaded."""


def load(name: str) -> Imputer:
    """Import a method.

    Parameters
    ----------
    name
        One of :data:`METHODS`, or ``"path/to/file.py:function"`` for a method of one's own.

    Returns
    -------
    The function ``impute(adata) -> (prediction, scale)``.

    Raises
    ------
    ValueError
        If `name` is neither, or the file does not define the function.
    """
    if name in METHODS:
        module_name, function = METHODS[name].split(":")
        return getattr(importlib.import_module(f"{__name__}.{module_name}"), function)
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(
            f"method {name!r} is not known; give one of {', '.join(METHODS)}, or 'path/to/file.py:function' of a file "
            "that exists."
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"method {name!r}: {path} defines no {function!r}; name a function of that file.")
    return getattr(module, function)
