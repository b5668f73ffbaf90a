"""``sf.tl.evaluate``: score a prediction, of this package or any other, on counts that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spaformer_sc import __version__, _checks
from spaformer_sc._config import OUTPUTS
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._keys import EVALUATED, EVALUATED_OF_CELLS, Keys
from spaformer_sc._result import known_of
from spaformer_sc._write import write_scores

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@takes_tables
def evaluate(
    adata: AnnData | SpatialData,
    held_out: str,
    *,
    table_key: str | None = None,
    prediction: str = "spaformer",
    scale: str | None = None,
    layer: str | None = None,
    missing: str | None = None,
    use_rep: str | None = None,
    key_added: str | None = None,
    random_state: int = 0,
) -> None:
    """Score a prediction on counts that it has not seen, over all genes, per gene and per cell.

    :func:`spaformer_sc.tl.impute` scores itself on transcripts that it holds out. This is for counts of your own, such
    as half of all transcripts set aside (:func:`spaformer_sc.metrics.thin`), and for layers of other methods. What is
    compared are shares of a cell's transcripts, so that depth plays no part.

    Parameters
    ----------
    adata
        Counts, held-out counts and prediction, of the same cells and genes.
    held_out
        Layer with the held-out counts. They must be no part of what the prediction was made from.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    prediction
        Layer with the prediction: name of a result of :func:`spaformer_sc.tl.impute`, or any layer. Genes with NaN are
        not scored.
    scale
        Scale of the layer: ``"lognorm"``, ``"counts"`` or ``"rate"``. Needed for layers that are no result of
        :func:`spaformer_sc.tl.impute`.
    layer
        Layer with the counts that the prediction was made from; None for ``adata.X``.
    missing
        Layer that is True where a gene was not measured; these entries are not scored. It, ``scale`` and ``layer`` are
        known of results of :func:`spaformer_sc.tl.impute`, and not to be given.
    use_rep
        Representation of the cells in ``adata.obsm``, in which cells alike are scored together; by default that of the
        result, or none: cells are not scored then.
    key_added
        Name of what is written; by default that of the prediction with ``"_evaluated"``.
    random_state
        Seed of the groups of cells that standard errors rest on.

    Returns
    -------
    None. These fields are set, as :func:`spaformer_sc.tl.impute` explains them:

    ``adata.var[key_added + …]`` (genes)
        ``_pearson``, ``_deviance_explained``, ``_gain_over_baseline`` and ``_true_correlation``, float64, with
        ``…_se``; ``_gain``, float64; ``_held_out``, int64; ``_reliability``, categorical.
    ``adata.obs[key_added + …]`` (cells), where cells have a representation
        ``_gain``, ``_gain_se``, float64; ``_reliability``, categorical.
    ``adata.uns[key_added]`` : dict
        ``params``, and ``scores`` over all genes.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the input cannot be used; before any work, with nothing changed.

    Examples
    --------
    >>> split = sf.metrics.thin(adata.X, 0.5, random_state=0)
    >>> adata.X, adata.layers["held"] = split.train, split.held
    >>> sf.tl.impute(adata, library_key="fov")
    >>> sf.tl.evaluate(adata, "held")
    """
    from spaformer_sc.metrics import convert
    from spaformer_sc.training.reliability import groups_alike, scores_of_groups
    from spaformer_sc.training.scoring import held_out_scores

    _checks.check_adata(adata)
    _checks.check_layer("held_out", adata, held_out)
    _checks.check_layer("prediction", adata, prediction)
    keys = Keys(Keys(prediction).evaluated if key_added is None else key_added)
    slots = [("var", keys.var(score)) for score in EVALUATED] + [
        ("obs", keys.obs(score)) for score in EVALUATED_OF_CELLS
    ]
    _checks.check_key_added(adata, keys.key_added, slots=slots, mark="evaluated")
    record = adata.uns.get(prediction)
    params = record.get("params", {}) if isinstance(record, Mapping) else {}
    is_ours = "spaformer_sc" in params
    if is_ours:
        record = _checks.check_result(adata, prediction)
        for name, given in (("scale", scale), ("layer", layer), ("missing", missing)):
            if given is not None:
                raise ValueError(f"`{name}={given!r}`: it is known of the result {prediction!r}; leave it out.")
        scale, layer, missing = params["output"], params["layer"], params["missing"]
        use_rep = Keys(prediction).embedding if use_rep is None else use_rep
    elif scale is None:
        raise ValueError(f"`prediction={prediction!r}` is no result of `sf.tl.impute`; pass `scale=`.")
    _checks.check_choice("scale", scale, OUTPUTS)
    if held_out in (layer, prediction):
        raise ValueError(
            f"`held_out={held_out!r}` is also what the prediction was made from, or the prediction; give counts that "
            "it has not seen."
        )
    values = adata.layers[prediction]
    values = values.toarray() if sp.issparse(values) else np.asarray(values)
    if values.dtype.kind not in "buif":
        raise TypeError(f"`prediction={prediction!r}` must hold numbers, but its dtype is {values.dtype}.")
    values = values.astype(np.float32)
    genes = np.flatnonzero(np.isfinite(values).all(axis=0))
    if not len(genes):
        raise ValueError(f"`prediction={prediction!r}` holds NaN or infinite values in every gene.")
    hidden = _checks.check_layer_of_missing(adata, missing)
    representation = None if use_rep is None else _checks.check_representation(adata, use_rep)
    seed = _checks.check_integer("random_state", random_state, minimum=0)
    rng = np.random.default_rng(seed)
    train, held = (_whole(_checks.read_counts(adata, name), rng)[:, genes] for name in (layer, held_out))
    if is_ours and record["posterior"] is not None and params["zeros"] == "impute":
        rates = known_of(adata, adata.var_names[genes], prediction).mean.astype(np.float32)
    else:
        rates = convert(values[:, genes], str(scale), "rate")
    if hidden is not None:
        hidden = hidden[:, genes]
        train, held = (counts.multiply(~hidden).tocsr() for counts in (train, held))
    overall, per_gene, gains = held_out_scores(held, rates, train, hidden, rng)
    per_gene.index = adata.var_names[genes]
    per_gene = per_gene[list(EVALUATED)].reindex(adata.var_names)
    per_gene["held_out"] = per_gene["held_out"].fillna(0).astype(np.int64)
    cells = pd.DataFrame(index=adata.obs_names)
    if representation is not None:
        alike, _ = groups_alike(representation, seed)
        scored = scores_of_groups(gains, np.asarray(held.sum(axis=1), dtype=np.float64).ravel(), alike)
        cells = scored.iloc[alike][list(EVALUATED_OF_CELLS)]
    said: dict[str, Any] = {
        "evaluated": prediction,
        "version": __version__,
        "held_out": held_out,
        "scale": str(scale),
        "layer": layer,
    }
    said |= {"missing": missing, "use_rep": use_rep, "random_state": seed}
    write_scores(
        adata,
        keys,
        gene_scores=per_gene,
        cell_scores=cells,
        record={"params": said, "scores": overall},
        clear=[keys.obs(score) for score in EVALUATED_OF_CELLS if score not in cells],
    )


def _whole(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts with fractions rounded at random, as in a fit."""
    return counts if _checks.is_whole(counts) else _checks.integerize(counts, rng)
