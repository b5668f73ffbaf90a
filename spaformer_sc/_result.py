"""What a result in an AnnData says of its entries: read back from what `_write` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _checks
from ._keys import Keys
from .metrics._protocols import row_blocks
from .training.posterior import Posterior

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
    """

    mean: NDArray[np.float64]
    shape: NDArray[np.float64]
    depth: NDArray[np.float64]
    posterior: Posterior
    target_sum: float

    @property
    def per_count(self) -> NDArray[np.float64]:
        """Rate for each expected count (cells, 1); NaN in cells without counts."""
        depth = np.where(self.depth > 0, self.depth, np.nan)
        return np.asarray(self.target_sum / depth)[:, None]


class Entries:
    """Some genes of what :func:`spaformer_sc.tl.impute` wrote, read block by block; all imputed genes if None.

    Attributes
    ----------
    genes
        Names of the genes.
    shape
        Cells × genes.
    posterior
        How shapes come about.
    target_sum
        What rates add up to.

    Raises
    ------
    KeyError
        If there is no such result, or no such gene.
    ValueError
        If a gene was not imputed, the result has no posterior, or counts are no longer those that it was made from.
    """

    def __init__(self, adata: AnnData, genes: Any, key_added: str) -> None:
        keys = Keys(key_added)
        record = _checks.check_result(adata, keys.uns, [("layers", keys.layer), ("obs", keys.obs("depth"))])
        params = record["params"]
        self._output, self.target_sum = str(params["output"]), float(params["target_sum"])
        back = [keys.var(name) for name in ("dispersion", "dispersion_missing") if self._output == "lognorm"]
        _checks.check_result(adata, keys.uns, [("var", name) for name in back])
        self.posterior = Posterior.from_dict(_checks.check_posterior(key_added, record))
        imputed = genes_of(params)
        if genes is None:
            genes = adata.var_names if imputed is None else adata.var_names[adata.var_names.isin(imputed)]
        columns = _checks.check_genes(adata, genes)
        _checks.check_imputed(adata.var_names[columns], imputed)
        self._counts = _checks.counts_of_result(adata, params)[:, columns].tocsr()
        self._values, self._columns = adata.layers[keys.layer], columns
        missing = _checks.check_layer_of_missing(adata, params["missing"])
        self._missing = None if missing is None else missing[:, columns]
        self._dispersion = None
        if back:
            self._dispersion = np.stack([adata.var[name].to_numpy()[columns] for name in back], axis=1)
        self._depth = adata.obs[keys.obs("depth")].to_numpy(dtype=np.float64)
        self.genes = [str(name) for name in adata.var_names[columns]]
        self.shape = adata.n_obs, len(columns)

    def known(self, rows: slice = slice(None)) -> Known:
        """What is known of some cells."""
        values, depth = np.asarray(self._values[rows][:, self._columns]), self._depth[rows]
        missing = None if self._missing is None else self._missing[rows]
        own, scale = self._counts[rows].toarray(), (self._output, self.target_sum, depth, self._dispersion)
        mean, shape = self.posterior.entries(values, own, missing, *scale)
        return Known(mean, shape, depth, self.posterior, self.target_sum)

    def blocks(self) -> Iterator[tuple[slice, Known]]:
        """What is known of all cells, a block at a time, so that temporaries stay small."""
        for rows in row_blocks((self.shape[0], 4 * self.shape[1])):
            yield rows, self.known(rows)


def known_of(adata: AnnData, genes: Any, key_added: str) -> Known:
    """What is known of all cells; arguments and errors as for :class:`Entries`."""
    return Entries(adata, genes, key_added).known()


def genes_of(params: Mapping[str, Any]) -> list[str] | None:
    """Genes that a result was made for, or None for all; files give lists back as arrays."""
    genes = params["genes"]
    return None if isinstance(genes, str) else [str(name) for name in genes]
