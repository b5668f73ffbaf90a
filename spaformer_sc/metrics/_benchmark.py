"""The three protocols of the benchmark: what a method is given, and what its prediction scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from spaformer_sc.metrics._calibration import calibrate_lognorm, calibrate_rates
from spaformer_sc.metrics._protocols import Matrix, as_counts, hide_blocks, hide_entries, row_blocks, thin
from spaformer_sc.metrics._scores import (
    cosine,
    deviance_explained,
    gene_pearson,
    gene_pearson_lognorm,
    pearson,
    poisson_gain,
    rmse,
)

PROTOCOLS = ("thinning", "entries", "blocks")
SCALES = ("rate", "counts", "lognorm")


@dataclass(frozen=True, eq=False)
class Split:
    """Counts split by :func:`make_split` into what a method sees, a validation part and a test part.

    Parameters
    ----------
    protocol
        ``"thinning"``, ``"entries"`` or ``"blocks"``.
    train
        Counts that a method sees, CSR, cells × genes.
    validation, test
        Counts that it does not see, CSR, cells × genes; the three add up to the original counts.
    validation_mask, test_mask
        Entries hidden for validation and for the test, zeros included; boolean, cells × genes. None under thinning,
        where every entry is split.
    target_sum
        Library size that log-normalised values refer to.
    """

    protocol: str
    train: sparse.csr_matrix
    validation: sparse.csr_matrix
    test: sparse.csr_matrix
    validation_mask: NDArray[np.bool_] | None
    test_mask: NDArray[np.bool_] | None
    target_sum: float

    @property
    def output(self) -> str:
        """Scale that is scored: ``"rate"`` under thinning, ``"lognorm"`` otherwise."""
        return "rate" if self.protocol == "thinning" else "lognorm"

    @property
    def missing(self) -> NDArray[np.bool_] | None:
        """All hidden entries, boolean, cells × genes; None under thinning."""
        if self.test_mask is None or self.validation_mask is None:
            return None
        return self.test_mask | self.validation_mask

    def truth(self) -> sparse.csr_matrix:
        """Return log1p(count / full library size × ``target_sum``) of the hidden counts: CSR, float32."""
        held = (self.validation + self.test).tocsr()
        library = np.asarray((self.train + held).sum(axis=1, dtype=np.float64)).ravel()
        scale = self.target_sum / np.maximum(library, 1)
        return (sparse.diags_array(scale) @ held).log1p().astype(np.float32).tocsr()


def quarters(coordinates: NDArray[Any]) -> NDArray[np.int64]:
    """Label each cell by the quarter of the image that it lies in, cut at the median position.

    Parameters
    ----------
    coordinates
        Positions, cells × 2 or more, any unit; the first two columns are used.

    Returns
    -------
    Labels from 0 to 3, one per cell.
    """
    xy = np.asarray(coordinates)[:, :2]
    labels: NDArray[np.int64] = (xy > np.median(xy, axis=0)).astype(np.int64) @ np.array([1, 2])
    return labels


def make_split(
    counts: Matrix,
    protocol: str,
    labels: ArrayLike | None = None,
    random_state: int | np.random.Generator = 0,
    target_sum: float = 250.0,
) -> Split:
    """Split counts into what methods see, a validation part and a test part.

    - ``"thinning"``: each transcript is seen with probability 0.5, is for validation with 0.05 and for the test with
      0.45 (:func:`thin`, twice).
    - ``"entries"``: each entry, zeros included, is hidden for the test with probability 0.3 and for validation with
      0.03; cells that would be left without counts are left alone (:func:`hide_entries`).
    - ``"blocks"``: 30 % of the genes are hidden in each field of view (:func:`hide_blocks`); a tenth of these in each,
      at least one, is for validation.

    Parameters
    ----------
    counts
        Raw counts, cells × genes, dense or sparse. Not changed.
    protocol
        ``"thinning"``, ``"entries"`` or ``"blocks"``.
    labels
        Field of view of each cell, for ``"blocks"``; of an image without, see :func:`quarters`.
    random_state
        Seed or generator.
    target_sum
        Library size that log-normalised values refer to, in counts.

    Returns
    -------
    The split.

    Raises
    ------
    TypeError, ValueError
        If `counts` are not counts, `protocol` is unknown, `labels` are needed and not given, or so few genes are hidden
        in a field of view that none is left for the test.

    References
    ----------
    Batson, Royer and Webber (2019), bioRxiv 786269 (thinning); Wen et al. (2023), arXiv 2302.03038 (entries).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol={protocol!r}` is not one of {', '.join(PROTOCOLS)}.")
    rng = np.random.default_rng(random_state)
    if protocol == "thinning":
        halves = thin(counts, 0.5, rng)
        held = thin(halves.held, 0.1, rng)
        return Split(protocol, halves.train, held.train, held.held, None, None, target_sum)

    matrix = as_counts(counts, "counts")
    if protocol == "entries":
        entries = hide_entries(matrix, 0.33, rng, target_sum)
        train, hidden = entries.train, entries.hidden
        validation = np.empty_like(hidden)
        for rows in row_blocks(hidden.shape):
            validation[rows] = hidden[rows] & (rng.random(hidden[rows].shape, dtype=np.float32) < 1 / 11)
    else:
        if labels is None:
            raise ValueError("`labels` are needed under 'blocks': give the field of view of each cell.")
        blocks = hide_blocks(matrix, labels, 0.3, rng)
        train, hidden = blocks.train, blocks.layer()
        chosen = np.zeros_like(blocks.missing)
        for fov, missing in enumerate(blocks.missing):
            genes = np.flatnonzero(missing)
            if len(genes) < 2:
                raise ValueError("`counts` have so few genes that 30 % of them are one; 'blocks' needs at least two.")
            chosen[fov, rng.choice(genes, size=max(1, round(0.1 * len(genes))), replace=False)] = True
        validation = chosen[blocks.fov_index]
    held_counts = (matrix - train).tocoo()
    for_validation = validation[held_counts.row, held_counts.col]

    def part(use: NDArray[np.bool_]) -> sparse.csr_matrix:
        where = held_counts.row[use], held_counts.col[use]
        return as_counts(sparse.csr_matrix((held_counts.data[use], where), shape=matrix.shape), "counts")

    return Split(
        protocol, train, part(for_validation), part(~for_validation), validation, hidden & ~validation, target_sum
    )


def convert(prediction: NDArray[Any], scale: str, output: str, target_sum: float = 250.0) -> NDArray[np.float32]:
    r"""Bring a prediction to the scale that is scored.

    From ``"lognorm"`` to ``"rate"`` by :math:`\exp(p) - 1`, values below 0 taken for 0; from ``"rate"`` or ``"counts"``
    to ``"lognorm"`` by :math:`\log(1 + \mathrm{target\_sum} \cdot r_{ig} / \sum_h r_{ih})`, the log of an expectation:
    a method that can give the expectation of the log itself does better to.

    Parameters
    ----------
    prediction
        Predicted values of all entries, cells × genes.
    scale
        What they are: ``"rate"`` (within a cell proportional to expected counts), ``"counts"`` (expected counts) or
        ``"lognorm"`` (log1p(count / library size × `target_sum`)).
    output
        ``"rate"`` or ``"lognorm"``.
    target_sum
        Library size that log-normalised values refer to.

    Returns
    -------
    Float32, cells × genes.

    Raises
    ------
    ValueError
        If `scale` is unknown, or `prediction` is not finite, or negative where it is a rate or a count.
    """
    if scale not in SCALES:
        raise ValueError(f"`scale={scale!r}` is not one of {', '.join(SCALES)}.")
    values = np.asarray(prediction, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("`prediction` holds NaN or infinite values; a prediction is needed for every entry.")
    if scale != "lognorm" and (values < 0).any():
        raise ValueError(f"`prediction` holds negative values (smallest: {values.min():g}), but its scale is {scale}.")
    if output == "rate":
        return np.expm1(np.maximum(values, 0)) if scale == "lognorm" else values
    if scale == "lognorm":
        return values
    sums = values.sum(axis=1, dtype=np.float64, keepdims=True)
    factor = np.divide(target_sum, sums, out=np.zeros_like(sums), where=sums > 0)
    logged: NDArray[np.float32] = np.log1p(values * factor.astype(np.float32))
    return logged


def score_prediction(split: Split, prediction: NDArray[Any], scale: str) -> dict[str, float]:
    """Score a prediction on the test part of a split, as it is and calibrated on the validation part.

    Parameters
    ----------
    split
        From :func:`make_split`; the prediction was made from its ``train`` and ``missing``.
    prediction
        Predicted values of all entries, cells × genes.
    scale
        ``"rate"``, ``"counts"`` or ``"lognorm"``, see :func:`convert`.

    Returns
    -------
    Scores by name. Under thinning ``gain`` (:func:`poisson_gain`), ``deviance_explained`` and ``gene_pearson`` (median
    over genes of :func:`gene_pearson_lognorm`). Otherwise, over the entries hidden for the test, ``rmse``,
    ``rmse_nonzero`` (entries that are not 0), ``pearson``, ``cosine`` and ``gene_pearson`` (median over genes with
    hidden counts of :func:`gene_pearson`, 0 where it is not defined, as for a constant prediction). Each again with
    ``_calibrated`` after its name, for the prediction after :func:`calibrate_rates` or :func:`calibrate_lognorm`.

    Raises
    ------
    ValueError
        If shapes differ, or as :func:`convert`.
    """
    if prediction.shape != split.train.shape:
        raise ValueError(
            f"`prediction` has shape {prediction.shape}, but the split has {split.train.shape}; they must agree."
        )
    values = convert(prediction, scale, split.output, split.target_sum)
    if split.validation_mask is None or split.test_mask is None or split.missing is None:
        calibrated, _ = calibrate_rates(values, split.train, split.validation)
        found = {"": _rate_scores(split, values), "_calibrated": _rate_scores(split, calibrated)}
    else:
        truth = split.truth()
        calibrated, _ = calibrate_lognorm(
            values, truth, split.validation_mask, split.train, split.missing, split.target_sum
        )
        found = {
            name: _lognorm_scores(truth, version, split.test, split.test_mask)
            for name, version in (("", values), ("_calibrated", calibrated))
        }
    return {score + suffix: value for suffix, scores in found.items() for score, value in scores.items()}


def _rate_scores(split: Split, rates: NDArray[np.float32]) -> dict[str, float]:
    return {
        "gain": poisson_gain(split.test, rates, split.train),
        "deviance_explained": deviance_explained(split.test, rates, split.train),
        "gene_pearson": _median(gene_pearson_lognorm(split.test, rates)),
    }


def _lognorm_scores(
    truth: sparse.csr_matrix, prediction: NDArray[np.float32], test: sparse.csr_matrix, mask: NDArray[np.bool_]
) -> dict[str, float]:
    detected = np.asarray(test.sum(axis=0)).ravel() > 0
    return {
        "rmse": rmse(truth, prediction, mask=mask),
        "rmse_nonzero": rmse(truth, prediction, mask=mask, nonzero=True),
        "pearson": pearson(truth, prediction, mask=mask),
        "cosine": cosine(truth, prediction, mask=mask),
        "gene_pearson": _median(np.nan_to_num(gene_pearson(truth, prediction, mask=mask)[detected])),
    }


def _median(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")
