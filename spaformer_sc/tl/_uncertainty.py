"""What is known of imputed entries beyond their mean: intervals, draws, and zeros that would not stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._memory import available_memory
from spaformer_sc._result import Entries
from spaformer_sc.training.posterior import count_interval, mean_interval
from spaformer_sc.training.posterior import detection as detection_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

OF = ("count", "rate")


@dataclass(frozen=True)
class Interval:
    """Intervals of the entries of an imputed matrix.

    Attributes
    ----------
    lower, upper
        Ends, both inside (cells × genes): int32 for counts, float32 for rates.
    level
        Share of the entries that they are meant to hold.
    genes
        Names of the genes, in order.
    """

    lower: NDArray[Any]
    upper: NDArray[Any]
    level: float
    genes: list[str]

    def __repr__(self) -> str:
        return f"Interval({self.level:.0%}, {len(self.lower)} cells × {len(self.genes)} genes)"


@takes_tables
def interval(
    adata: AnnData | SpatialData,
    genes: str | Sequence[str] | None = None,
    level: float = 0.9,
    *,
    table_key: str | None = None,
    of: str = "count",
    key_added: str = "spaformer",
) -> Interval:
    r"""Say between which values a new count, or the rate, lies.

    The expected count of an entry has a gamma posterior whose mean is what was imputed and whose shape was fitted to
    held-out counts; a new count is negative binomial. The level of count intervals is set by how often they covered
    other held-out counts (split conformal prediction: Vovk et al. 2005). Counts are discrete: the interval is the
    shortest that holds the count with at least the probability asked for, and most often holds it with more.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`, with the counts it was made from; not changed.
    genes
        One name or several; all imputed ones by default.
    level
        Share of the entries to hold, between 0 and 1.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    of
        ``"count"``: a new count of the gene in the cell, measured once more at the same depth. ``"rate"``: the rate
        itself, in the scale of ``output="rate"`` (share of the cell's transcripts times ``target_sum``): a central
        credible interval, with equal tails, without conformal correction, since true rates are never seen.
    key_added
        Name of the result.

    Returns
    -------
    An object with ``lower`` and ``upper``, both inside the interval (cells × genes). For cells without counts, new
    counts lie in [0, 0] and rates are NaN.

    Raises
    ------
    KeyError
        If there is no such result, or no such gene.
    ValueError
        If ``level`` or ``of`` cannot be, a gene was not imputed, the result knows no distribution of counts (the
        Gaussian decoder, or ``zeros="keep"``), or the counts have changed since.

    Examples
    --------
    >>> found = sf.tl.interval(adata, ["EPCAM", "VIM"], level=0.9)
    >>> found.lower, found.upper
    """
    level = _checks.check_share("level", level)
    _checks.check_choice("of", of, OF)
    entries = Entries(adata, genes, key_added)
    dtype = np.int32 if of == "count" else np.float32
    found = Interval(np.empty(entries.shape, dtype), np.empty(entries.shape, dtype), level, entries.genes)
    for rows, known in entries.blocks():
        if of == "count":
            low, high = count_interval(known.mean, known.shape, known.posterior.level_for(level))
        else:
            low, high = (end * known.per_count for end in mean_interval(known.mean, known.shape, level))
        found.lower[rows], found.upper[rows] = low, high
    return found


@takes_tables
def sample(
    adata: AnnData | SpatialData,
    genes: str | Sequence[str] | None = None,
    n: int = 100,
    *,
    table_key: str | None = None,
    of: str = "rate",
    key_added: str = "spaformer",
    random_state: int = 0,
) -> NDArray[np.float32]:
    """Draw from the posterior of imputed entries.

    Entries are drawn independently of one another: draws carry what is uncertain of single entries, but not what the
    model has wrong in all cells of a kind together. Means over many cells vary less between draws than they are
    uncertain; ``docs/trust.md`` says what that does to tests of differential expression.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`, with the counts it was made from; not changed.
    genes
        One name or several; all imputed ones by default.
    n
        Number of draws.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    of
        ``"rate"``: the rate, in the scale of ``output="rate"``. ``"count"``: a new count at the same depth.
    key_added
        Name of the result.
    random_state
        Seed.

    Returns
    -------
    Draws, float32 (n × cells × genes). In cells without counts, counts are 0 and rates NaN.

    Raises
    ------
    KeyError, ValueError
        As in :func:`interval`; also if there is not memory enough for the draws.

    Examples
    --------
    >>> draws = sf.tl.sample(adata, ["EPCAM"], n=20)
    """
    n = _checks.check_integer("n", n)
    _checks.check_choice("of", of, OF)
    rng = np.random.default_rng(_checks.check_integer("random_state", random_state, minimum=0))
    entries = Entries(adata, genes, key_added)
    need, free = 4 * n * entries.shape[0] * entries.shape[1], available_memory()
    if free is not None and need > free:
        raise ValueError(
            f"{n} draws of {entries.shape[0]} cells × {entries.shape[1]} genes take {need / 2**30:.1f} GiB and only "
            f"{free / 2**30:.1f} GiB of memory are free: name fewer `genes`, or ask for fewer draws (`n`) at a time."
        )
    draws = np.empty((n, *entries.shape), dtype=np.float32)
    for rows, known in entries.blocks():
        scale = known.mean / known.shape
        for draw in draws:
            drawn = rng.gamma(known.shape, scale)
            draw[rows] = rng.poisson(drawn) if of == "count" else drawn * known.per_count
    return draws


@takes_tables
def detection(
    adata: AnnData | SpatialData,
    genes: str | Sequence[str] | None = None,
    *,
    table_key: str | None = None,
    capture: float = 1.0,
    key_added: str = "spaformer",
) -> NDArray[np.float32]:
    """Probability that a new measurement would count at least one transcript: which zeros would not stay zero.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`, with the counts it was made from; not changed.
    genes
        One name or several; all imputed ones by default.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    capture
        Depth of the new measurement, in that of the data: 1 for the same, 5 for one that catches five times as many
        transcripts.
    key_added
        Name of the result.

    Returns
    -------
    Probabilities, float32 (cells × genes); 0 in cells without counts.

    Raises
    ------
    KeyError, ValueError
        As in :func:`interval`.

    Examples
    --------
    >>> likely = sf.tl.detection(adata, ["EPCAM"], capture=5)
    """
    capture = _checks.check_positive("capture", capture)
    entries = Entries(adata, genes, key_added)
    found = np.empty(entries.shape, dtype=np.float32)
    for rows, known in entries.blocks():
        found[rows] = detection_of(known.mean, known.shape, capture)
    return found
