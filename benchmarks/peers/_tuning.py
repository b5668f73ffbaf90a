"""One way to tune for all methods: hide some of the input once more, and let what was hidden choose.

Where counts were thinned, the input is thinned again, 80 % to 20 %, and the Poisson likelihood of the 20 % chooses.
Where entries were hidden, a further fifth of the visible ones is hidden: single entries at random (protocol
``entries``), or genes in a whole field of view (``blocks``); the squared error of their log-normalised values chooses.
With the setting come the weights that mix the method with the gene mean.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from peers._cells import Cells, FloatArray, generator
from spaformer_sc.metrics import mixture_weights, thin

Setting = tuple[Any, ...]
Family = Callable[[Cells, list[Setting], NDArray[np.intp], int], Iterator[tuple[Setting, FloatArray]]]
"""``family(cells, grid, rows, random_state)`` yields every setting of the grid, in an order of its own, with what it
predicts for the cells in ``rows``, in the scale ``cells.output``: log-normalised values, or rates (non-negative, any
scale per cell, zero throughout where it has nothing to say)."""

_TUNING_CELLS = 4000
_SHARE = 0.2


def as_shares(rates: FloatArray, mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale every cell's rates to sum one; a cell without any gets the gene mean."""
    sums = rates.sum(axis=1, keepdims=True)
    shares = np.asarray(rates / np.where(sums > 0, sums, 1), dtype=np.float32)
    shares[sums.ravel() == 0] = mean
    return shares


@dataclass(frozen=True, eq=False)
class Validation:
    """A further split of the input.

    Parameters
    ----------
    cells
        What is left to predict from.
    rows
        Cells that are scored.
    entries
        Entries that are scored: row within `rows`, and gene.
    truth
        Held counts of these entries, or their log-normalised values.
    """

    cells: Cells
    rows: NDArray[np.intp]
    entries: tuple[NDArray[np.intp], NDArray[np.intp]]
    truth: NDArray[np.float64]

    def mean(self) -> NDArray[np.float32]:
        """Gene mean of each scored entry."""
        return self.cells.gene_mean[self.entries[1]]


def split(cells: Cells, protocol: str, random_state: int) -> Validation:
    """Hide a fifth of the input once more, in the way of the protocol."""
    rng = generator(random_state, "validation")
    n_cells = len(cells.fovs)
    if protocol == "thinning":
        parts = thin(cells.counts, 1 - _SHARE, random_state=rng)
        rows = _tuning_rows(n_cells, rng)
        held = parts.held[rows].tocoo()
        inner = replace(cells, counts=parts.train)
        return Validation(inner, rows, (held.row.astype(np.intp), held.col.astype(np.intp)), held.data.astype(float))

    if protocol == "blocks":
        inner, hidden = cells.hide(_blocks(cells, rng))
    else:
        inner, hidden = hide_more_entries(cells, _SHARE, rng)
    rows = _tuning_rows(n_cells, rng)
    entries = np.nonzero(hidden[rows] & (cells.depth[rows] > 0)[:, None])
    truth = cells.counts[rows].toarray()[entries].astype(np.float64) / cells.depth[rows][entries[0]]
    return Validation(inner, rows, entries, np.log1p(truth * cells.target_sum))


def _tuning_rows(n_cells: int, rng: np.random.Generator) -> NDArray[np.intp]:
    return np.sort(rng.choice(n_cells, size=min(n_cells, _TUNING_CELLS), replace=False))


def hide_more_entries(cells: Cells, share: float, rng: np.random.Generator) -> tuple[Cells, NDArray[np.bool_]]:
    """Hide a share of the visible entries, none in cells that would be left without counts; see `Cells.hide`."""
    hidden = rng.random(cells.counts.shape, dtype=np.float32) < share
    left = cells.hide(hidden)[0].counts.getnnz(axis=1)
    hidden[left == 0] = False
    return cells.hide(hidden)


def _blocks(cells: Cells, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose a fifth of the visible genes of each field of view, leaving each gene visible in one at least."""
    names = np.unique(cells.fovs)
    seen = np.broadcast_to(cells.visible > 0, cells.counts.shape)
    visible = np.stack([seen[cells.fovs == fov].any(axis=0) for fov in names])
    home = np.where(visible, rng.random(visible.shape), -1).argmax(axis=0)
    hidden = np.zeros(cells.counts.shape, bool)
    for row, fov in enumerate(names):
        free = np.flatnonzero(visible[row] & (home != row))
        genes = rng.choice(free, size=min(round(_SHARE * visible[row].sum()), len(free)), replace=False)
        hidden[np.ix_(cells.fovs == fov, genes)] = True
    return hidden


def mixture(counts: FloatArray, parts: FloatArray) -> tuple[FloatArray, float]:
    """Find the weights of a mixture of predictions that make held counts most likely.

    Parameters
    ----------
    counts
        Held counts, one for each scored entry. Entries that no part gives a share to are left out.
    parts
        Share of the gene in the cell as each part predicts it, parts × entries.

    Returns
    -------
    The weights, which sum to one, and the log-likelihood (nats per held count, up to a constant).
    """
    possible = parts.any(axis=0)
    shares, x = parts[:, possible].astype(np.float64), counts[possible]
    weights = mixture_weights(shares, x)
    return weights, float(x @ np.log(weights @ shares) / x.sum())


def _weights(validation: Validation, part: FloatArray) -> tuple[FloatArray, float]:
    """Return the weights of the method, the gene mean (and a constant), and the score, higher is better."""
    parts = np.stack([part, validation.mean()]).astype(np.float64)
    if validation.cells.output == "rate":
        return mixture(validation.truth, parts)
    design = np.vstack([parts, np.ones(parts.shape[1])])
    weights = np.linalg.lstsq(design @ design.T, design @ validation.truth)[0]
    return weights, -float(np.mean((validation.truth - weights @ design) ** 2))


def mix(weights: FloatArray, parts: list[FloatArray], output: str) -> NDArray[np.float32]:
    """Add up predictions and, for log-normalised values, a constant, whose weight comes last."""
    total = np.zeros(np.broadcast_shapes(*(part.shape for part in parts)), np.float32)
    for weight, part in zip(weights, parts):
        if weight:
            total += np.float32(weight) * part
    if output == "lognorm":
        total += np.float32(weights[-1])
        np.maximum(total, 0, out=total)
    return total


@dataclass(frozen=True, eq=False)
class Fit:
    """A tuned method: its setting, weights, seconds taken, and predictions without the gene mean mixed in.

    `inner` is predicted from the inner part for the entries of :class:`Validation`; `final` from the whole input for
    all entries. Both are shares or log-normalised values.
    """

    setting: Setting
    weights: FloatArray
    seconds: float
    inner: NDArray[np.float32]
    final: NDArray[np.float32]


@dataclass(frozen=True)
class Tuned:
    """A family of methods made into one that chooses its setting on the input.

    Parameters
    ----------
    name
        Name of the method.
    family
        Predicts with every setting of a grid.
    rate, lognorm
        Settings to choose from for either output.
    """

    name: str
    family: Family
    rate: list[Setting]
    lognorm: list[Setting]

    def __call__(self, adata: AnnData) -> tuple[NDArray[np.float32], str]:
        """Impute; the prediction has the gene mean mixed in."""
        cells = Cells.of(adata)
        fit, _ = self.fit(cells, adata.uns["task"])
        return mix(fit.weights, [fit.final, cells.gene_mean], cells.output), cells.output

    def fit(self, cells: Cells, task: dict[str, Any], *, stored: bool = False) -> tuple[Fit, bool]:
        """Tune and predict; leave the result in the scratch folder of the task if there is one.

        Parameters
        ----------
        cells
            The input.
        task
            ``adata.uns["task"]``.
        stored
            Whether to take a result from the scratch folder that was made from the same input and grid.

        Returns
        -------
        The fit, and whether it was computed.
        """
        start = time.perf_counter()
        grid = self.rate if cells.output == "rate" else self.lognorm
        store = None if task["scratch"] is None else Store(Path(task["scratch"]), self.name, _key(cells, task, grid))
        if stored and store is not None and (found := store.read()) is not None:
            return found, False
        random_state = int(task["random_state"])
        validation = split(cells, task["protocol"], random_state)
        best: tuple[float, Setting, FloatArray, NDArray[np.float32]] | None = None
        for setting, prediction in self.family(validation.cells, grid, validation.rows, random_state):
            shares = as_shares(prediction, validation.cells.gene_mean) if cells.output == "rate" else prediction
            part = np.asarray(shares[validation.entries], dtype=np.float32)
            weights, score = _weights(validation, part)
            if best is None or score > best[0]:
                best = score, setting, weights, part
        if best is None:
            raise ValueError(f"{self.name} has no setting to choose from")
        score, setting, weights, inner = best
        print(f"{self.name}: chose {setting}, weights {np.round(weights, 3).tolist()}", file=sys.stderr)
        ((_, final),) = self.family(cells, [setting], np.arange(len(cells.fovs)), random_state)
        final = as_shares(final, cells.gene_mean) if cells.output == "rate" else np.asarray(final, dtype=np.float32)
        fit = Fit(setting, weights, time.perf_counter() - start, inner, final)
        if store is not None:
            store.write(fit)
        return fit, True


def _key(cells: Cells, task: dict[str, Any], grid: list[Setting]) -> list[Any]:
    """Describe the input and the grid, so that a stored result is not taken for another's."""
    checksum = 0
    missing = np.zeros(0, bool) if cells.missing is None else np.packbits(cells.missing)
    for array in (cells.counts.indptr, cells.counts.indices, cells.counts.data, cells.coords, cells.fovs, missing):
        checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
    return [
        checksum,
        task["protocol"],
        cells.output,
        cells.target_sum,
        int(task["random_state"]),
        [list(s) for s in grid],
    ]


@dataclass(frozen=True)
class Store:
    """A tuned method's result in a folder: two float32 arrays, and a JSON file that is written last."""

    folder: Path
    name: str
    key: list[Any]

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"

    def read(self) -> Fit | None:
        """Return the stored result, or None if there is none for this key."""
        path = self._path(".json")
        if not path.exists():
            return None
        facts = json.loads(path.read_text())
        if facts["key"] != self.key:
            return None
        inner, final = (np.load(self._path(suffix), mmap_mode="r") for suffix in ("_inner.npy", "_final.npy"))
        return Fit(tuple(facts["setting"]), np.array(facts["weights"]), facts["seconds"], inner, final)

    def write(self, fit: Fit) -> None:
        """Write a result, each file in one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(".json").unlink(missing_ok=True)
        for suffix, array in (("_inner.npy", fit.inner), ("_final.npy", fit.final)):
            self._replace(suffix, lambda file, array=array: np.save(file, array))
        facts = {
            "key": self.key,
            "setting": list(fit.setting),
            "weights": fit.weights.tolist(),
            "seconds": fit.seconds,
        }
        self._replace(".json", lambda file: file.write(json.dumps(facts).encode()))

    def _replace(self, suffix: str, write: Callable[[Any], Any]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=self.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.replace(temporary, self._path(suffix))
        except BaseException:
            os.unlink(temporary)
            raise
