"""Positional encodings as an array in `adata.obsm`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData, ImplicitModificationWarning

from spaformer_sc._checks import (
    check_adata,
    check_choice,
    check_connectivities,
    check_coordinates,
    check_flag,
    check_integer,
    check_key_added,
    check_library_key,
)
from spaformer_sc._config import POSITIONAL
from spaformer_sc._logging import logger
from spaformer_sc.data._fields import GraphConfig, fields_of_view
from spaformer_sc.data._graph import given_graph
from spaformer_sc.data._labels import field_codes

if TYPE_CHECKING:
    from torch import Tensor


def positional_encoding(
    adata: AnnData,
    name: str,
    *,
    library_key: str | Sequence[str] | None = None,
    spatial_key: str = "spatial",
    connectivity_key: str | None = None,
    n_neighbors: int = 6,
    k: int = 10,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Write the features of a positional encoding, to plot or to use elsewhere.

    These are what a model computes of each field of view (FOV) before anything is learned: a fixed function of the
    cells' positions and of their spatial graph, the same in every call. Positions are counted from the mean of the FOV,
    in typical distances between its neighbouring cells (the median length of an edge of the graph), so their unit does
    not matter; of three axes, x and y are encoded. Each FOV is encoded by itself and whole, whereas a model cuts a
    large one into overlapping tiles and takes the graph of each tile.

    Parameters
    ----------
    adata
        The data.
    name
        The encoding; columns written for each cell are

        ``"laplacian"``, ``"signnet"``
            `k` eigenvectors of the Laplacian of the cell's connected component, the smoothest first, 0 where there are
            no more. Both encodings start from these; SignNet maps them by a network that has to be trained.
        ``"random_walk"``
            `k` probabilities that a random walk on the graph is back at the cell after 1, …, k steps.
        ``"patch"``
            Row and column, from 0 to 32, of the cell's bin in a grid of bins of 10 typical distances; the FOV's centre
            is in the middle of bin 16, 16.
        ``"linear"``, ``"mlp"``
            x and y, divided by 30 typical distances.
        ``"sinusoidal"``
            4 `k` sinusoids of `k` wavelengths from 4 to 1000 typical distances: sines of x, of y, cosines of x, of y.
        ``"fourier"``
            2 `k` random Fourier features, cosines and sines, of a Gaussian of standard deviation 10 typical distances.
    library_key
        Column of `adata.obs` that tells fields of view apart, or a list of columns. None takes all cells as one field.
    spatial_key
        Name of the positions in `adata.obsm`.
    connectivity_key
        Name of a spatial graph in `adata.obsp` to use; None builds one of nearest neighbours. Of its weights it only
        counts where they are above 0.
    n_neighbors
        Number of nearest neighbours of the graph that is built.
    k
        Number of eigenvectors, steps, wavelengths or frequencies.
    key_added
        Name of what is written; None for ``f"X_pe_{name}"``. What an earlier call wrote is replaced; anything else is
        kept, with an error.
    copy
        Return a changed copy instead of changing `adata`.

    Returns
    -------
    None, or the copy if `copy=True`. Written are:

    `adata.obsm[key_added]` : float32 array, cells × features
        The features.
    `adata.uns[key_added]` : dict
        ``{"params": {"encoding", "library_key", "spatial_key", "connectivity_key", "n_neighbors", "k"}}``.

    Raises
    ------
    KeyError
        If `library_key`, `spatial_key` or `connectivity_key` does not exist.
    TypeError
        If an argument is of the wrong type.
    ValueError
        If there is no encoding `name`, positions or labels are missing, the graph is none, `n_neighbors` or `k` is
        below 1, or `key_added` would overwrite other data.
    """
    check_adata(adata)
    check_choice("name", name, POSITIONAL)
    n_neighbors = check_integer("n_neighbors", n_neighbors)
    k = check_integer("k", k)
    copy = check_flag("copy", copy)
    key = f"X_pe_{name}" if key_added is None else key_added
    check_key_added(adata, key, slots=[("obsm", key)], mark="encoding")
    if key == spatial_key:
        raise ValueError(f"`key_added={key!r}` is also `spatial_key`, which would be lost; choose another name.")
    columns = check_library_key(adata, library_key)
    codes, fields = field_codes(adata.obs, columns)
    coordinates = check_coordinates(adata, spatial_key, codes)
    given = None if connectivity_key is None else given_graph(check_connectivities(adata, connectivity_key), codes)

    import spaformer_sc.positional as positional
    from spaformer_sc.nn.seeding import seeded

    with seeded(0):
        encoding = positional.POSITIONAL[name](1, k)

    def shown(features: dict[str, Tensor]) -> Tensor:
        first = features[encoding.feature_names[0]]
        return encoding.basis(first) if isinstance(encoding, positional.CoordinateEncoding) else first

    fovs, _ = fields_of_view(
        coordinates,
        codes,
        fields,
        graph=GraphConfig(n_neighbors=n_neighbors),
        given=given,
        n_rings=0,
        tile_size=adata.n_obs,
        encode=encoding.features,
    )
    parts = [shown(fov.features).numpy() for fov in fovs]
    values = np.empty((adata.n_obs, parts[0].shape[1]), dtype=np.float32)
    for fov, part in zip(fovs, parts, strict=True):
        values[fov.cells] = part

    result = adata.copy() if copy else adata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        result.obsm[key] = values
    result.uns[key] = {
        "params": {
            "encoding": name,
            "library_key": columns,
            "spatial_key": spatial_key,
            "connectivity_key": connectivity_key,
            "n_neighbors": n_neighbors,
            "k": k,
        },
    }
    logger.info("added `obsm[%r]`: %d features of %d cells", key, values.shape[1], len(values))
    return result if copy else None
