"""What a result in an AnnData says of its entries: read back from what `_write` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _checks
from ._keys import Keys
from .training.posterior import Posterior, expected_counts

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Known:
    """What is known of some genes of a result (cells × genes each), and the depth of each cell.

    Attributes
    ----------
    mean, shape
        Mean and shape of the gamma posterior of the expected count at the cell's own depth.
    depth
        Depth over all genes (cells,).
    posterior
        How the shape came about.
    target_sum
        What rates add up to.
    genes
        Names of the genes.
    """

    mean: NDArray[np.float64]
    shape: NDArray[np.float64]
    depth: NDArray[np.float64]
    posterior: Posterior
    target_sum: float
    genes: list[str]

    @property
    def per_count(self) -> NDArray[np.float64]:
        """Rate for each expected count (cells, 1); NaN in cells without counts."""
        depth = np.where(self.depth > 0, self.depth, np.nan)
        return np.asarray(self.target_sum / depth)[:, None]


def known_of(adata: AnnData, genes: Any, key_added: str) -> Known:
    """Read what :func:`spaformer_sc.tl.impute` wrote of some genes; all genes that were imputed if None.

    Raises
    ------
    KeyError
        If there is no such result, or no such gene.
    ValueError
        If a gene was not imputed, the result has no posterior, or counts are no longer those that it was made from.
    """
    keys = Keys(key_added)
    record = _checks.check_result(adata, keys.uns)
    params = record["params"]
    if record.get("posterior") is None:
        raise ValueError(
            f"`key_added={key_added!r}`: the result was made with decoder={params['model']['decoder']!r}, which knows "
            "no distribution of counts; impute with decoder='nb', 'poisson' or 'zinb'."
        )
    if params["zeros"] != "impute":
        raise ValueError(
            f"`key_added={key_added!r}`: the result was made with zeros={params['zeros']!r}, which took away what was "
            "known of these zeros; impute with zeros='impute', under another `key_added` if both are needed."
        )
    if genes is None:
        genes = list(adata.var_names) if params["genes"] == "all" else list(params["genes"])
    names = [genes] if isinstance(genes, str) else list(genes)
    columns = _checks.check_genes(adata, names)
    _checks.check_imputed(names, params["genes"])
    counts = _checks.counts_of_result(adata, params)
    own = np.asarray(counts[:, columns].toarray(), dtype=np.float64)
    missing = None
    if params["missing"] is not None:
        missing = np.asarray(adata.layers[params["missing"]][:, columns], dtype=bool)
        own[missing] = 0
    dispersion = None
    if params["output"] == "lognorm":
        parts = (adata.var[keys.var(name)].to_numpy()[columns] for name in ("dispersion", "dispersion_missing"))
        dispersion = np.stack(list(parts), axis=1)
    posterior = Posterior.from_dict(record["posterior"])
    depth = adata.obs[keys.obs("depth")].to_numpy(dtype=np.float64)
    target_sum = float(params["target_sum"])
    values = np.asarray(adata.layers[keys.layer][:, columns])
    mean = expected_counts(values, params["output"], target_sum, depth, dispersion, missing)
    shape = posterior.shape(mean, own, missing)
    return Known(mean, shape, depth, posterior, target_sum, [str(name) for name in adata.var_names[columns]])
