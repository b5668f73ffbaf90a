"""``sf.tl.impute``: graphs, encodings, training and write-back in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spaformer_sc import __version__, _checks
from spaformer_sc._config import ADVANCED, OUTPUTS, TARGET_SUMS, ZEROS
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._gather import InMemory, OnDisk
from spaformer_sc._keys import BACK, OF_CELLS, SCORES, Keys
from spaformer_sc._logging import logger
from spaformer_sc._memory import size_on_disk, state_disk
from spaformer_sc._write import check_path, write_atomically, write_result, write_streamed
from spaformer_sc.metrics._protocols import row_blocks
from spaformer_sc.model import Opened, SpaFormer

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from spaformer_sc.training.posterior import Posterior

LEAST_DETECTION = 0.05
"""Probability that an observed zero would be a count in a second measurement, below which ``zeros="keep"`` keeps it."""


@_checks.explains_unknown_arguments(ADVANCED)
@takes_tables
def impute(
    adata: AnnData | SpatialData,
    *,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = None,
    spatial_key: str = "spatial",
    connectivity_key: str | None = None,
    layer: str | None = None,
    genes: Any = None,
    preset: str = "default",
    quality: str = "default",
    positional: str | Sequence[str] | None = "auto",
    encoder: str = "auto",
    decoder: str = "auto",
    variational: bool = False,
    masking: str | Sequence[str] | None = "auto",
    n_latent: int | None = None,
    max_epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    graph: Literal["knn", "delaunay", "radius"] = "knn",
    n_neighbors: int = 6,
    radius: float | None = None,
    tile_size: int = 4000,
    output: str = "lognorm",
    target_sum: float | None = None,
    missing: str | None = None,
    zeros: str = "impute",
    sd: bool = False,
    key_added: str = "spaformer",
    output_path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str = "auto",
    devices: int = 1,
    random_state: int = 0,
    progress: bool | None = None,
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Fill in missing expression from each cell's own counts, its neighbours and its field of view.

    Builds a spatial graph for every field of view (FOV), trains a masked autoencoder in which the cells of a FOV are
    tokens (SpaFormer: Wen et al., arXiv 2302.03038), and writes imputed expression, a latent space and scores on
    held-out counts. ``X``, ``raw`` and existing graphs are not changed. Data of more than about 100 million entries
    (cells times genes) are fitted to some of their FOVs, drawn at random; scores are of these.

    Parameters
    ----------
    adata
        Raw counts (cells × genes) and the cells' coordinates: an AnnData, or a SpatialData with one in a table.
    table_key
        Of a SpatialData, the table to work on, in place; may be left out where there is only one. The other elements
        are not read. Where the object belongs to a file, the table is changed in memory only, and saved by
        ``sdata.delete_element_from_disk("table")`` and ``sdata.write_element("table")``, or ``sdata.write`` to another
        place.
    library_key
        Column of ``adata.obs`` that names the FOV of each cell, or a list of columns, such as ``["slide", "fov"]``,
        whose combination does. None takes the slide as one image, cut into overlapping tiles where it is large.
    spatial_key
        Coordinates in ``adata.obsm`` (cells × 2 or 3), any unit.
    connectivity_key
        A graph of your own in ``adata.obsp`` to use in place of ``graph``; edges between FOVs are left out.
    layer
        Layer that holds the raw counts; None for ``adata.X``.
    genes
        Names of the genes to write; all by default. The layer is NaN for the others. All genes are used for the fit.
    preset
        ``"default"``, or ``"paper"`` for the configuration of the paper.
    quality
        How many networks are trained and averaged: ``"fast"`` one, ``"default"`` five (one with the paper's
        preset), ``"best"`` ten. Time grows with them.
    positional
        How a cell's place is told to the network, beside its neighbours' expression: ``"laplacian"``, ``"signnet"``,
        ``"random_walk"``, ``"linear"``, ``"mlp"``, ``"sinusoidal"``, ``"fourier"``, ``"patch"``; ``"conditional"`` and
        ``"conditional_gat"``, which depend on the neighbours' expression by a graph network; a list of them, or None.
        ``"auto"`` is None, and ``"signnet"`` in the paper's preset.
    encoder
        ``"performer"`` (linear attention), ``"performer_relu"`` (the same with the ReLU kernel), ``"exact"`` (softmax
        attention), ``"gat"`` (graph attention to the neighbours in the spatial graph) or ``"mlp"`` (no exchange between
        cells beyond their neighbours' mean expression). ``"auto"`` is ``"performer"``.
    decoder
        Likelihood: ``"poisson"``, ``"nb"``, ``"zinb"`` (counts) or ``"gaussian"`` (log-normalised values; scales other
        than ``"lognorm"`` are then derived from these and are not expectations). The dispersion of ``"nb"`` and
        ``"zinb"`` is per gene; ``settings={"dispersion": "gene_fov"}`` makes it per gene and FOV, ``"entry"`` per
        entry. ``"auto"`` is ``"nb"``, and ``"gaussian"`` in the paper's preset.
    variational
        Train with a variational latent. Its divergence has a weight of 0.01: the latent is made from what is visible
        and judged by what is hidden, so that this is an information bottleneck and not an evidence lower bound.
    masking
        What is hidden in training: ``"thinning"``, ``"bilevel"``, ``"tokens"``, ``"features"`` (genes of single cells),
        ``"genes"`` (of all cells of a FOV), a list of which each cell, and for ``"genes"`` each FOV, draws one in each
        epoch, or None. ``"auto"`` is ``"thinning"``, with ``"features"`` or, if most is missing in whole FOVs,
        ``"genes"`` where ``missing`` is given, and ``"bilevel"`` with the Gaussian decoder. Only thinning teaches how
        much to trust a cell's own count; without it the count is not used again after the network.
    n_latent
        Dimensions of the latent space; 64, or 20 in the paper's preset, by default.
    max_epochs
        Passes over all cells; by default as many as 2,000 training steps take (8,000 smaller ones of a large network or
        perceptron, of the latter up to twice as many on many cells), or fewer for networks after the first of a form.
        Training stops earlier when the score on what is held out no longer improves.
    settings
        Every other choice by name, for method work: a dictionary with entries such as ``{"hops": 0, "dropout": 0.1,
        "windows": True}``; ``docs/settings.md`` lists them.
    graph, n_neighbors, radius
        Spatial graph: ``"knn"`` with ``n_neighbors``, ``"delaunay"``, or ``"radius"`` (in the unit of the coordinates).
    tile_size
        Largest number of cells of a tile; a FOV of more than 1.5 times as many is cut into overlapping tiles.
    output
        Scale of what is written. ``"lognorm"``: the expectation of ``log1p(count * target_sum / library size)``;
        ``"counts"``: the expected count at the cell's own depth; ``"rate"``: the expected share of the gene in the cell
        times ``target_sum``, which does not depend on depth.
    target_sum
        Library size that ``"lognorm"`` and ``"rate"`` refer to; the median over cells by default.
    missing
        Layer that is True where a gene was not measured in a cell (as when panels differ between FOVs); what it marks
        is not taken for zero.
    zeros
        ``"impute"``: every entry is imputed, zeros included. ``"keep"``: an observed zero stays 0 where a second
        measurement at the same depth would find it again with a probability of 0.95 or more
        (:func:`spaformer_sc.tl.detection`); intervals and draws are not to be had then.
    sd
        Also write the standard deviation of the posterior of each entry, as large a layer again.
    key_added
        Name of all that is written.
    output_path
        Also write the result, of a SpatialData the table, to this ``.h5ad`` or ``.zarr``, whole or not at all. Where
        the counts are in a file (``anndata.read_h5ad(path, backed="r")``) or lazy, the result goes there alone, FOV by
        FOV, and ``adata`` stays as it is: neither counts nor result need to fit into memory. What an unfinished run has
        done lies beside it in a folder that ends in ``.partial``.
    resume
        Go on with an unfinished run to the same ``output_path``, with the same data and choices; the result is that of
        an uninterrupted one. Without an unfinished run, start one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …; ``"auto"`` is ``sf.settings.device``, by default the first GPU if there is
        one.
    devices
        GPUs, or on a CPU processes, that train together (extra ``distributed``), each with its share of the cells of a
        step. More than 1 starts as many processes on this machine for the training, so a script has to be guarded by
        ``if __name__ == "__main__":``. Where torchrun or SLURM has started them, on one machine or several, it is the
        number of all; each has the result, and the first writes files. See ``docs/scale.md``.
    random_state
        Seed of everything random; on a CPU the same seed on the same machine gives the same result.
    progress
        Show a progress bar with the score on held-out counts; None for what ``sf.settings.progress`` says.
    copy
        Return a changed copy and leave ``adata`` as it is. Of a SpatialData, only the table is copied: the result is a
        SpatialData in memory that shares all other elements.

    Returns
    -------
    None, or what was passed in, changed, if ``copy``. These fields are set:

    ``adata.layers[key_added]`` : float32 (cells × genes)
        Imputed expression in the scale of ``output``. Cells without counts are 0 (``"rate"`` excepted).
    ``adata.layers[key_added + "_sd"]`` : float32 (cells × genes), with ``sd``
        Standard deviation of the posterior in the same scale; for ``"lognorm"`` to first order. NaN in cells without
        counts.
    ``adata.obsm["X_" + key_added]`` : float32 (cells × n_latent)
        Latent space, for ``sc.pp.neighbors(adata, use_rep="X_spaformer")``; that of the first network. It knows a
        cell's neighbours; for cell types, use ``sc.pp.pca(adata, layer="spaformer")``.
    ``adata.var[key_added + "_pearson"]`` : float64 (genes)
        Pearson correlation over cells of held-out counts with their prediction, both log-normalised, so that depth
        plays no part; the gene mean scores 0. NaN where nothing was held out.
    ``adata.var[key_added + "_deviance_explained"]``, ``adata.var[key_added + "_gain"]`` : float64 (genes)
        Share of the Poisson deviance explained, and log-likelihood gained per held-out transcript (nats), both over
        "library size times gene mean". Below 0: no better than the gene mean on the transcripts held out.
    ``adata.var[key_added + "_pearson_neighbours"]``, ``…_deviance_explained_neighbours`` : float64 (genes)
        The same scores of a simple baseline: the cell's own counts, those of its direct neighbours and the gene means,
        mixed by weights fitted to other held-out transcripts. The gene mean scores 0 in both.
    ``adata.var[key_added + "_gain_over_baseline"]``, ``…_gain_over_baseline_se`` : float64 (genes)
        Log-likelihood gained per held-out transcript (nats) over what the gene's own counts tell, and its standard
        error: what the verdict rests on.
    ``adata.var[key_added + "_true_correlation"]`` : float64 (genes)
        Estimate of the correlation over cells of imputed with true relative expression, with the noise of held-out
        counts taken out; what varies beyond Poisson noise counts as truth. Cut at −1 and 1; NaN where nothing varies.
    ``adata.var[key_added + "_pearson_se"]``, ``…_deviance_explained_se``, ``…_true_correlation_se`` : float64 (genes)
        Standard errors of these scores (jackknife over 20 groups of cells).
    ``adata.var[key_added + "_held_out"]`` : int64 (genes)
        Number of held-out transcripts that these scores rest on; below a few dozen they say little.
    ``adata.var[key_added + "_reliability"]`` : categorical (genes)
        ``"no better than baseline"``: no gain was shown, at a level of 5 %, over what the gene's own counts tell (its
        mean, the cell's depth, and its count there), or fewer than 10 transcripts were held out; ``"reliable"``: the
        gain lies more than 3 standard errors above 0, and the true correlation is estimated to be 0.5 or more;
        ``"weak"``: in between. In shallow data many genes that are imputed well cannot be shown to be.
    ``adata.var[key_added + "_dispersion"]``, ``…_dispersion_missing`` : float64 (genes)
        What leads from ``"lognorm"`` back to expected counts, where measured and where not; else NaN. Read by
        :func:`spaformer_sc.tl.interval` and others.
    ``adata.obs[key_added + "_depth"]`` : float32 (cells)
        Depth that expected counts refer to: the library size, or, where entries are missing, an estimate of what it
        would be over all genes.
    ``adata.obs[key_added + "_gain"]``, ``…_gain_se`` : float64 (cells)
        Log-likelihood gained over the gene mean, in nats per held-out transcript, and its standard error, of about 50
        cells that are closest in the latent space, since a single cell has too few held-out transcripts.
    ``adata.obs[key_added + "_reliability"]`` : categorical (cells)
        As for genes, of these cells together, but without a demand on correlation.
    ``adata.uns[key_added]`` : dict
        ``params``; ``history`` of the training; ``scores`` over all genes; ``fovs``, scores of each field of view;
        ``posterior``, what intervals rest on (None with the Gaussian decoder).

    Raises
    ------
    KeyError, TypeError, ValueError
        If the input cannot be used; before any work, with nothing changed.
    ImportError
        If ``devices`` is more than 1 and Lightning is not there.
    MemoryError, OSError
        If there is too little memory, or too little space for ``output_path``; before any work.

    References
    ----------
    Wen et al. (2023), Single Cells Are Spatial Tokens: Transformers for Spatial Transcriptomic Data Imputation,
    arXiv 2302.03038.

    Examples
    --------
    >>> import spaformer_sc as sf
    >>> adata = sf.datasets.simulated_tissue()
    >>> sf.tl.impute(adata, library_key="fov")
    """
    _checks.check_adata(adata)
    _checks.check_choice("output", output, OUTPUTS)
    _checks.check_choice("zeros", zeros, ZEROS)
    _checks.check_flag("sd", sd)
    _checks.check_flag("copy", copy)
    _checks.check_resume(resume, output_path)
    _checks.check_view(adata, copy)
    keys = Keys(key_added)
    _checks.check_key_added(adata, key_added, slots=keys.slots, mark="spaformer_sc")
    if target_sum is not None:
        target_sum = _checks.check_number("target_sum", target_sum, *TARGET_SUMS)
    columns = None if genes is None else _checks.check_genes(adata, genes)
    if output_path is not None:
        check_path("output_path", output_path)
    model = SpaFormer(
        library_key=library_key,
        spatial_key=spatial_key,
        connectivity_key=connectivity_key,
        layer=layer,
        missing=missing,
        preset=preset,
        quality=quality,
        positional=positional,
        encoder=encoder,
        decoder=decoder,
        variational=variational,
        masking=masking,
        n_latent=n_latent,
        max_epochs=max_epochs,
        settings=settings,
        graph=graph,
        n_neighbors=n_neighbors,
        radius=radius,
        tile_size=tile_size,
        device=device,
        devices=devices,
        random_state=random_state,
        progress=progress,
    )
    if model.settings.decoder == "gaussian" and (sd or zeros == "keep"):
        wanted = "sd=True" if sd else "zeros='keep'"
        raise ValueError(
            f"`{wanted}` needs a distribution of counts: decoder='nb', 'poisson' or 'zinb', not 'gaussian'."
        )
    asked = {
        "output": output,
        "target_sum": target_sum,
        "genes": "all" if columns is None else [str(name) for name in adata.var_names[columns]],
        "key_added": key_added,
        "preset": preset,
        "quality": quality,
        "zeros": zeros,
    }
    backed = adata.isbacked
    if backed and copy:  # closes the file, so that nothing can be read from it later
        adata = adata.to_memory()
    streamed = output_path is not None and not copy and _checks.lies_outside_memory(adata, layer)
    gather: Callable[[int, int, int], InMemory | OnDisk] = InMemory
    checkpoint = None
    if output_path is not None:
        from spaformer_sc.training.checkpoint import Checkpoint

        unfinished = Path(output_path).with_name(f"{Path(output_path).name}.partial")
        checkpoint = Checkpoint(unfinished, resume=resume, choices={**asked, "sd": sd, **model.parameters()})
        if streamed:
            n_genes = adata.n_vars if columns is None else len(columns)
            state_disk(
                unfinished.parent,
                result=4 * adata.n_obs * adata.n_vars * (1 + sd) + size_on_disk(adata.filename),
                until_whole=6 * adata.n_obs * (n_genes + model.settings.n_latent),  # tiles overlap
                there=size_on_disk(unfinished) if resume else 0,
            )
            gather = partial(OnDisk, unfinished / "rows")
    with checkpoint or nullcontext():
        found, opened = model._fit_predict(
            adata,
            output=output,
            target_sum=target_sum,
            columns=columns,
            gather=gather,
            checkpoint=checkpoint,
            kept=0 if streamed else 4 * adata.n_obs * adata.n_vars * (1 + sd),
        )
        if copy and not backed:
            adata = adata.copy()
        _write(adata, keys, model, found, opened, asked, columns, sd, output_path if model._ranks.first else None)
        model._ranks.wait()
    return adata if copy else None


def _write(
    adata: AnnData,
    keys: Keys,
    model: SpaFormer,
    found: InMemory | OnDisk,
    opened: Opened,
    asked: dict[str, Any],
    columns: NDArray[np.int64] | None,
    sd: bool,
    output_path: str | os.PathLike[str] | None,
) -> None:
    """Write what a fit has given into ``adata`` and, if asked for, to a file; to that alone where it lies on disk."""
    asked = {**asked, "target_sum": float(asked["target_sum"] or model.target_sum)}
    back = found.dispersion(asked["target_sum"])
    depth = found.depth
    gene_scores = model.gene_scores[list(SCORES)].copy()
    for number, name in enumerate(BACK):
        gene_scores[name] = np.nan if back is None else _among_all(back[:, number], columns, adata.n_vars)
    judge = None
    if model.posterior is not None and (sd or asked["zeros"] == "keep"):
        scale = asked["output"], asked["target_sum"], back
        judge = partial(_judge, opened, columns, model.posterior, scale, asked["zeros"] == "keep")
    results = {
        "embedding": found.embedding,
        "gene_scores": gene_scores,
        "cell_scores": model.cell_scores.assign(depth=depth)[list(OF_CELLS)],
        "record": {
            "params": {"spaformer_sc": __version__, **asked, "n_genes": adata.n_vars, **model.parameters()},
            "history": model.history,
            "scores": model.scores,
            "fovs": {"fov": [str(name) for name in model.fov_scores.index]}
            | {name: _listed(model.fov_scores[name]) for name in model.fov_scores},
            "posterior": None if model.posterior is None else model.posterior.to_dict(),
        },
    }
    if isinstance(found, InMemory):
        deviation = None if judge is None else np.empty_like(found.expression)
        if judge is not None and deviation is not None:
            for rows in row_blocks((adata.n_obs, 4 * adata.n_vars)):  # a quarter: there are many temporaries
                deviation[rows] = judge(found.expression[rows], rows, depth[rows])
        write_result(
            adata,
            keys,
            expression=_among_all(found.expression, columns, adata.n_vars),
            sd=_among_all(deviation, columns, adata.n_vars) if sd and deviation is not None else None,
            **results,
        )
    logger.info(
        "held-out transcripts: %.3f nats gained on each over gene means; median correlation per gene %.3f, with single "
        "transcripts, whose noise keeps it low",
        model.scores["gain"],
        model.scores["median_pearson"],
    )
    if output_path is not None:
        if isinstance(found, OnDisk):
            blended = partial(_blended, found, judge, depth, columns, adata.n_vars)
            write_streamed(adata, output_path, keys, layer_of=blended, sd=sd, **results)
        else:
            write_atomically(adata, output_path)
        logger.info("wrote %s", os.fspath(output_path))


Judge = Callable[[NDArray[np.float32], slice, NDArray[np.float32]], NDArray[np.float32]]


def _blended(
    found: OnDisk,
    judge: Judge | None,
    depth: NDArray[np.float32],
    columns: NDArray[np.int64] | None,
    n_genes: int,
    rows: slice,
    sd: bool,
) -> NDArray[np.float32]:
    """Imputed expression of some cells (cells × all genes), or its standard deviations."""
    values = found.blend(rows)[:, : found.n_genes]
    deviation = None if judge is None else judge(values, rows, depth[rows])
    return _among_all(deviation if sd and deviation is not None else values, columns, n_genes)


def _judge(
    opened: Opened,
    columns: NDArray[np.int64] | None,
    posterior: Posterior,
    scale: tuple[str, float, NDArray[np.float64] | None],
    keep: bool,
    values: NDArray[np.float32],
    rows: slice,
    depth: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Standard deviation of the posterior of some cells; with ``keep``, confident zeros among ``values`` go to 0."""
    from spaformer_sc.training.posterior import detection, standard_deviation

    chosen = slice(None) if columns is None else columns
    own = opened.counts.rows(np.arange(rows.start, rows.stop))[:, chosen].toarray()
    hidden = None if opened.missing is None else opened.missing[rows][:, chosen]
    output, target_sum, dispersion = scale
    full = depth.astype(np.float64)
    mean, shape = posterior.entries(values, own, hidden, output, target_sum, full, dispersion)
    if keep:
        confident = (own == 0) & (detection(mean, shape) < LEAST_DETECTION)
        values[confident if hidden is None else confident & ~hidden] = 0
    return standard_deviation(mean, shape, output, target_sum, full)


def _among_all(values: NDArray[Any], columns: NDArray[np.int64] | None, n_genes: int) -> NDArray[Any]:
    """Values of some genes (…, columns) among all (…, n_genes), NaN elsewhere."""
    if columns is None:
        return values
    wide = np.full((*values.shape[:-1], n_genes), np.nan, dtype=values.dtype)
    wide[..., columns] = values
    return wide


def _listed(column: pd.Series) -> list[Any]:
    """Values of a column as a list of plain ones."""
    return list(column.astype(str)) if isinstance(column.dtype, pd.CategoricalDtype) else column.tolist()
