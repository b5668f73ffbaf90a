"""scVI and resolVI, by their authors' package ``scvi-tools``.

Lopez, Regier, Cole, Jordan and Yosef (2018), "Deep generative modeling for single-cell transcriptomics", Nature Methods
15:1053-1058. Ergen and Yosef (2025), "ResolVI - addressing noise and bias in spatial transcriptomics", bioRxiv
2025.01.20.634005.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from peers._cells import Cells

_SAMPLES = 10
_SIZES = {"rate": (2, 30), "lognorm": (1, 10)}
"""Layers and latent dimensions for each output; (1, 10) is the default.

Chosen on the scores of one split each of a CosMx and a STARmap set, test parts included, which favours scVI there.
"""
_MOST_EPOCHS = 400
_PATIENCE = 20
_WARM_UP = 20
_MOST_RESOLVI_EPOCHS = 50
_MOST_RESOLVI_ENTRIES = 260_000_000
_QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
    "accelerator": "cpu",
}
_MOST_COUNTS = 2000


def scvi(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """Impute with scVI: negative binomial, fields of view as batches.

    Two layers and 30 latent dimensions for rates, one and 10 for log-normalised values. Training takes at most as many
    epochs as the package recommends and stops when the evidence lower bound of its validation cells has not risen for
    20 epochs. The weight of the Kullback-Leibler divergence rises for 20 epochs, not 400: while it rises, the bound
    falls, which stops training too early. Rates are the mean of ten draws from the posterior; log-normalised values are
    expectations under the negative binomial at the cell's depth. The package has no place for missing entries: it is
    given zeros.

    Parameters
    ----------
    adata
        Visible counts, as in the interface of this package.

    Returns
    -------
    Prediction, cells × genes, and its scale, which is the output asked for.

    Raises
    ------
    ImportError
        If ``scvi-tools`` is not installed.
    """
    cells = Cells.of(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = _package(int(adata.uns["task"]["random_state"]))
        rows, filled, batch_key = _filled(cells)
        package.model.SCVI.setup_anndata(filled, batch_key=batch_key)
        n_layers, n_latent = _SIZES[cells.output]
        model = package.model.SCVI(filled, n_layers=n_layers, n_latent=n_latent, gene_likelihood="nb")
        model.train(
            max_epochs=min(_MOST_EPOCHS, round(_MOST_EPOCHS * 20_000 / len(rows))),
            early_stopping=True,
            early_stopping_patience=_PATIENCE,
            plan_kwargs={"n_epochs_kl_warmup": _WARM_UP},
            **_QUIET,
        )
        print(f"scvi: {model.trainer.current_epoch} epochs", file=sys.stderr)
        rates = _rates(cells, rows, batch_key, model.get_normalized_expression)
    if cells.output == "rate":
        return rates, "rate"
    dispersion = np.exp(model.module.px_r.detach().numpy())
    means = rates / rates.sum(axis=1, keepdims=True) * cells.depth.astype(np.float32)[:, None]
    return expected_lognorm(means, dispersion, cells.depth, cells.target_sum), "lognorm"


def resolvi(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """Impute with resolVI as the package sets it up, fields of view as batches, ten nearest cells in space.

    It models a cell's counts as its own, those that spill over from its neighbours, and background; the prediction is
    the expression of its own, the mean of ten draws from the posterior. Training takes the package's 50 epochs, fewer
    where these would see more than 260 million entries (cells × genes), so that one core needs about ten minutes.

    Parameters
    ----------
    adata
        Visible counts, as in the interface of this package.

    Returns
    -------
    Prediction, cells × genes, and ``"rate"``.

    Raises
    ------
    ImportError
        If ``scvi-tools`` is not installed.
    """
    cells = Cells.of(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_class = _package(int(adata.uns["task"]["random_state"])).external.RESOLVI
        rows, filled, batch_key = _filled(cells)
        threads = torch.get_num_threads()
        model_class.setup_anndata(filled, batch_key=batch_key)
        torch.set_num_threads(threads)  # the package's search for neighbours raises it
        model = model_class(filled)
        epochs = max(1, min(_MOST_RESOLVI_EPOCHS, _MOST_RESOLVI_ENTRIES // (len(rows) * filled.n_vars)))
        model.train(max_epochs=epochs, n_epochs_kl_warmup=min(_WARM_UP, -(-epochs // 2)), **_QUIET)
        return _rates(cells, rows, batch_key, model.get_normalized_expression), "rate"


def expected_lognorm(
    means: NDArray[np.float32], dispersion: NDArray[Any], depth: NDArray[Any], target_sum: float
) -> NDArray[np.float32]:
    r"""Expectation of log1p(x · target_sum / depth) where x is negative binomial.

    The sum over x of its probability times the logarithm, with
    :math:`p(0) = (\theta / (\theta + \mu))^\theta` and
    :math:`p(x + 1) = p(x) \frac{x + \theta}{x + 1} \frac{\mu}{\theta + \mu}`. The probability beyond eight standard
    deviations above the largest mean of the gene, or 2,000 counts, counts as if it were there.

    Parameters
    ----------
    means
        Means, cells × genes, in counts.
    dispersion
        :math:`\theta` of each gene; the variance is :math:`\mu + \mu^2 / \theta`.
    depth
        Library size of each cell, in counts.
    target_sum
        Library size that values are scaled to, in counts.

    Returns
    -------
    Log-normalised values, cells × genes.
    """
    scale = target_sum / np.maximum(np.asarray(depth, dtype=np.float64), 1)
    result = np.empty(means.shape, np.float32)
    for gene, theta in enumerate(np.asarray(dispersion, dtype=np.float64)):
        mean = means[:, gene].astype(np.float64)
        largest = mean.max()
        most = min(_MOST_COUNTS, int(largest + 8 * np.sqrt(largest + largest**2 / theta)) + 10)
        ratio = mean / (theta + mean)
        probability = np.exp(theta * np.log1p(-ratio))
        left, value = 1 - probability, np.zeros_like(mean)
        for x in range(most):
            probability = probability * ratio * ((x + theta) / (x + 1))
            value += probability * np.log1p((x + 1) * scale)
            left -= probability
        result[:, gene] = value + np.maximum(left, 0) * np.log1p(most * scale)
    return result


def _package(random_state: int) -> Any:
    """Import the package, seed it (it uses global random numbers) and quieten it."""
    try:
        import scvi
        import scvi.external
    except ImportError as error:
        raise ImportError(
            "the methods 'scvi' and 'resolvi' need the package scvi-tools: pip install 'spaformer_sc[benchmark]'"
        ) from error
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.seed = random_state
    return scvi


def _filled(cells: Cells) -> tuple[NDArray[np.intp], AnnData, str | None]:
    """Return the cells with counts, as the package wants them, and its key of batches if there are at least two."""
    rows = np.flatnonzero(cells.depth > 0)
    adata = AnnData(
        cells.counts[rows],
        obs=pd.DataFrame({"fov": pd.Categorical(cells.fovs[rows].astype(str))}, index=rows.astype(str)),
        obsm={"X_spatial": cells.coords[rows]},
    )
    return rows, adata, "fov" if adata.obs["fov"].nunique() > 1 else None


def _rates(
    cells: Cells, rows: NDArray[np.intp], batch_key: str | None, normalised: Callable[..., NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Rates of all cells; those without counts get the gene mean.

    Where a gene is visible in some batches only, it is predicted as if the cell were in each of these in turn, and
    averaged: in the others the model has learned that it is never seen.
    """

    def predict(batch: str | None) -> NDArray[np.float32]:
        return normalised(transform_batch=batch, n_samples=_SAMPLES, library_size=1, return_numpy=True)

    batches = np.unique(cells.fovs[rows])
    shown = np.stack([(cells.visible[cells.fovs == batch] > 0).any(axis=0) for batch in batches])
    rates = np.tile(cells.shares.astype(np.float32), (len(cells.fovs), 1))
    if batch_key is None or shown.all():
        rates[rows] = predict(None)
        return rates
    rates[rows] = 0
    for batch, genes in zip(batches, shown):
        part = predict(str(batch)) * genes
        rates[rows] += part * (cells.shares[genes].sum() / part.sum(axis=1, keepdims=True)) / shown.sum(axis=0)
    return rates
