"""Positional encodings as an array in `adata.obsm`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData, ImplicitModificationWarning
from numpy.typing import NDArray

from spaformer_sc._checks import (
    check_adata,
    check_choice,
    check_connectivities,
    check_coordinates,
    check_flag,
    check_images_apart,
    check_integer,
    check_key_added,
    check_library_key,
    check_positive,
    read_counts,
)
from spaformer_sc._config import POSITIONAL
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._keys import encoding_key
from spaformer_sc._logging import logger
from spaformer_sc.data._fields import FieldOfView, GraphConfig, Layout, fields_of_view
from spaformer_sc.data._graph import given_graph
from spaformer_sc.data._labels import field_codes

if TYPE_CHECKING:
    from scipy import sparse
    from spatialdata import SpatialData

    from spaformer_sc.positional import PositionalEncoding

TOKEN_WIDTH = 64
"""Width of the random tokens of conditional encodings, at least."""
LIBRARY_SIZE = 250.0
"""That counts are normalised to for them; fixed, so that a FOV's result does not depend on other FOVs."""


@takes_tables
def positional_encoding(
    adata: AnnData | SpatialData,
    name: str,
    *,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = None,
    spatial_key: str = "spatial",
    connectivity_key: str | None = None,
    layer: str | None = None,
    n_neighbors: int = 6,
    k: int = 10,
    n_frequencies: int = 64,
    patch_size: float | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Write the features of a positional encoding, to plot or to use elsewhere.

    These are what a model computes of each field of view (FOV) before anything is learned: a fixed function of the
    cells' positions and of their spatial graph, the same in every call. Positions are counted from the mean of the FOV,
    in typical distances between its neighbouring cells (the median length of an edge of the graph), so their unit does
    not matter; of three axes, x and y are encoded. Each FOV is encoded by itself and whole, whereas a model cuts a
    large one into overlapping tiles and takes the graph of each tile.

    Conditional encodings compute nothing before learning. What is written for them is their network with random
    weights, drawn from a fixed seed and not trained: it shows what kind of function of the neighbourhood the encoding
    is, not what a model makes of it.

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
            is in the middle of bin 16, 16. `patch_size` sets the side of a bin.
        ``"linear"``, ``"mlp"``
            x and y, divided by 30 typical distances.
        ``"sinusoidal"``
            4 `k` sinusoids of `k` wavelengths from 4 to 1000 typical distances: sines of x, of y, cosines of x, of y.
        ``"fourier"``
            2 `n_frequencies` random Fourier features, cosines and sines, of a Gaussian of standard deviation 10 typical
            distances.
        ``"conditional"``, ``"conditional_gat"``
            `k` outputs of the graph network, untrained (see above), on counts of `layer`: log1p of each cell's counts
            per 250, mapped to tokens by random weights. They depend on the order of the genes, and on the expression of
            the cell and of cells up to two steps away.

        Beside these arguments, those that tell where the data are and `n_neighbors` matter to all of them: the graph
        gives the typical distance.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    library_key
        Column of `adata.obs` that tells fields of view apart, or a list of columns. None takes all cells as one field.
    spatial_key
        Name of the positions in `adata.obsm`.
    connectivity_key
        Name of a spatial graph in `adata.obsp` to use; None builds one of nearest neighbours. Of its weights it only
        counts where they are above 0.
    layer
        Layer that holds the raw counts; None for `adata.X`. Read for conditional encodings only.
    n_neighbors
        Number of nearest neighbours of the graph that is built.
    k
        Number of eigenvectors (``"laplacian"``, ``"signnet"``), steps (``"random_walk"``), wavelengths
        (``"sinusoidal"``) or outputs (conditional).
    n_frequencies
        Number of frequencies (``"fourier"``).
    patch_size
        Side of a bin (``"patch"``), in the unit of the positions; None for 10 typical distances.
    key_added
        Name of what is written; None for ``f"X_pe_{name}"``. What an earlier call wrote is replaced; anything else is
        kept, with an error.
    copy
        Return a changed copy instead of changing `adata`; of a SpatialData, one that shares all but the table.

    Returns
    -------
    None, or the copy if `copy=True`. Written are:

    `adata.obsm[key_added]` : float32 array, cells × features
        The features.
    `adata.uns[key_added]` : dict
        ``{"params": …}`` with `encoding` (the name) and the arguments from `library_key` to `patch_size`.

    Raises
    ------
    KeyError
        If `library_key`, `spatial_key`, `connectivity_key` or `layer` does not exist.
    TypeError
        If an argument is of the wrong type.
    ValueError
        If there is no encoding `name`, positions or labels are missing, the graph is none, `n_neighbors`, `k` or
        `n_frequencies` is below 1, `patch_size` is not positive, a conditional encoding finds no raw counts, or
        `key_added` would overwrite other data.
    """
    check_adata(adata)
    check_choice("name", name, POSITIONAL)
    n_neighbors = check_integer("n_neighbors", n_neighbors)
    k = check_integer("k", k)
    n_frequencies = check_integer("n_frequencies", n_frequencies)
    patch_size = None if patch_size is None else check_positive("patch_size", patch_size)
    copy = check_flag("copy", copy)
    key = encoding_key(name) if key_added is None else key_added
    check_key_added(adata, key, slots=[("obsm", key)], mark="encoding")
    if key == spatial_key:
        raise ValueError(f"`key_added={key!r}` is also `spatial_key`, which would be lost; choose another name.")
    columns = check_library_key(adata, library_key)
    codes, fields = field_codes(adata.obs, columns)
    coordinates = check_coordinates(adata, spatial_key, codes)
    check_images_apart(adata, spatial_key, coordinates, codes, columns)
    given = None if connectivity_key is None else given_graph(check_connectivities(adata, connectivity_key), codes)

    from spaformer_sc.nn.seeding import seeded
    from spaformer_sc.positional import POSITIONAL as REGISTRY
    from spaformer_sc.positional import build_positional

    conditional = REGISTRY[name].needs_tokens
    counts = read_counts(adata, layer) if conditional else None
    with seeded(0):
        (encoding,) = build_positional(
            name, max(k, TOKEN_WIDTH) if conditional else 1, k=k, n_frequencies=n_frequencies, patch_size=patch_size
        )
    fovs, _ = fields_of_view(
        Layout(
            coordinates,
            codes,
            fields,
            graph=GraphConfig(n_neighbors=n_neighbors),
            given=given,
            n_rings=0,
            tile_size=adata.n_obs,
            encode=encoding.features,
        )
    )
    if counts is None:
        parts = [_features(encoding, fov) for fov in fovs]
    else:
        parts = [_untrained(encoding, fov, counts[fov.cells])[:, :k] for fov in fovs]
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
            "layer": layer,
            "n_neighbors": n_neighbors,
            "k": k,
            "n_frequencies": n_frequencies,
            "patch_size": patch_size,
        },
    }
    logger.info("added `obsm[%r]`: %d features of %d cells", key, values.shape[1], len(values))
    return result if copy else None


def _features(encoding: PositionalEncoding, fov: FieldOfView) -> NDArray[np.float32]:
    """First of the features of a FOV, or the fixed functions of it that the encoding learns a map of."""
    from spaformer_sc.positional import CoordinateEncoding

    first = fov.features[encoding.feature_names[0]]
    shown = encoding.basis(first) if isinstance(encoding, CoordinateEncoding) else first
    return np.asarray(shown.numpy())


def _untrained(encoding: PositionalEncoding, fov: FieldOfView, counts: sparse.csr_matrix) -> NDArray[np.float32]:
    """Conditional encoding, with the weights it has, of tokens that are a random linear map of expression."""
    import torch

    total = np.asarray(counts.sum(axis=1)).ravel()
    expression = counts.multiply(np.divide(LIBRARY_SIZE, total, out=np.zeros_like(total), where=total > 0)[:, None])
    weights = np.random.default_rng(0).standard_normal((counts.shape[1], encoding.dim), dtype=np.float32)
    tokens = torch.from_numpy(np.asarray(expression.tocsr().log1p() @ weights, dtype=np.float32))
    with torch.inference_mode():
        return np.asarray(encoding({}, fov.edge_index, token_features=tokens).numpy())
