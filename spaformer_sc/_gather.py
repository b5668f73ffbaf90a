"""Where predictions of fields of view are gathered: in memory, or in a file that is read and blended block by block."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._files import renewing

if TYPE_CHECKING:
    from .training.ranks import Ranks

LedBack = tuple[NDArray[Any], ...]
"""Of some cells: expected counts, values and which are measured (cells, genes each), and depth (cells,)."""


@dataclass(frozen=True)
class Block:
    """What is predicted of some cells of a FOV.

    Attributes
    ----------
    expression
        Imputed expression (cells, genes asked for); no columns where not asked for.
    embedding
        Latent (cells, n_latent); no columns where not asked for.
    depth
        Depth over all genes (cells,), that expected counts refer to.
    led_back
        What tells how log-normalised values lead back to expected counts, or None.
    """

    expression: NDArray[np.float32]
    embedding: NDArray[np.float32]
    depth: NDArray[np.float32]
    led_back: LedBack | None


class Gathered(Protocol):
    """What takes the predictions of all FOVs, and blends those of overlapping tiles.

    Attributes
    ----------
    n_cells
        Number of cells of the data.
    embedding
        Latent (cells, n_latent).
    depth
        Depth over all genes (cells,); 0 where expression is not asked for.
    """

    n_cells: int

    @property
    def embedding(self) -> NDArray[np.float32]: ...

    @property
    def depth(self) -> NDArray[np.float32]: ...

    def has(self, number: int) -> bool:
        """Whether a FOV, by its number in order, is there already."""

    def add(self, number: int, cells: NDArray[np.int64], weight: NDArray[np.float32], block: Block) -> None:
        """Add the prediction for some ``cells``, with the weight that it has in the result of each."""

    def leave(self, n_cells: int) -> None:
        """Leave the next FOV, of so many cells, to another rank."""

    def unite(self, n_fields: int, ranks: Ranks) -> None:
        """Take in the FOVs of the other ranks, so many in all."""

    def dispersion(self, target_sum: float) -> NDArray[np.float64] | None:
        """Dispersion (genes, 2) that leads from log-normalised values back to counts; None where not asked for."""


class InMemory:
    """Predictions in memory.

    Parameters
    ----------
    n_cells, n_genes, n_latent
        Numbers of cells, and of genes and latent dimensions that are asked for.

    Attributes
    ----------
    expression
        Imputed expression (cells, genes).
    embedding, depth
        As in :class:`Gathered`.
    """

    def __init__(self, n_cells: int, n_genes: int, n_latent: int) -> None:
        self.n_cells = n_cells
        self.expression = np.zeros((n_cells, n_genes), dtype=np.float32)
        self.embedding = np.zeros((n_cells, n_latent), dtype=np.float32)
        self.depth = np.zeros(n_cells, dtype=np.float32)
        self._led_back: list[LedBack] = []

    def has(self, number: int) -> bool:
        return False

    def add(self, number: int, cells: NDArray[np.int64], weight: NDArray[np.float32], block: Block) -> None:
        self.expression[cells] += block.expression * weight[:, None]
        self.embedding[cells] += block.embedding * weight[:, None]
        self.depth[cells] += block.depth * weight
        if block.led_back is not None:
            self._led_back.append(block.led_back)

    def leave(self, n_cells: int) -> None:
        pass

    def unite(self, n_fields: int, ranks: Ranks) -> None:
        for array in (self.expression, self.embedding, self.depth):
            ranks.add_up(array)
        self._led_back = [part for parts in ranks.all(self._led_back) for part in parts]

    def dispersion(self, target_sum: float) -> NDArray[np.float64] | None:
        return _dispersion(self._led_back, target_sum) if self._led_back else None


class OnDisk:
    """Predictions in a folder: a file of rows, FOV after FOV as they come, and a file for each FOV that is done.

    A FOV counts once its own file is there, which is put in place when its rows are written: a run that is killed and
    goes on writes the same. Several ranks write to the same files, each the rows of its FOVs.

    Parameters
    ----------
    folder
        Where the files are; made if it does not exist.
    n_cells, n_genes, n_latent
        As in :class:`InMemory`.
    """

    def __init__(self, folder: Path, n_cells: int, n_genes: int, n_latent: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.n_cells, self.n_genes = n_cells, n_genes
        self._folder, self._rows = folder, folder / "rows.float32"
        self._rows.touch()
        self._width = n_genes + n_latent + 1
        self._end = 0
        self._cells: list[NDArray[np.int64]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._led_back: list[LedBack] = []
        self._order: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]] | None = None

    def has(self, number: int) -> bool:
        path = self._file(number)
        if not path.exists():
            return False
        try:
            with open(path, "rb") as file, np.load(file) as kept:
                cells, weight = kept["cells"], kept["weight"]
                led_back = tuple(kept[f"led_back_{i}"] for i in range(4)) if "led_back_0" in kept else None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        if self._rows.stat().st_size < 4 * self._width * (self._end + len(cells)):
            return False
        self._note(cells, weight, led_back)
        return True

    def add(self, number: int, cells: NDArray[np.int64], weight: NDArray[np.float32], block: Block) -> None:
        rows = np.hstack([block.expression, block.embedding, block.depth[:, None]]).astype(np.float32, copy=False)
        with open(self._rows, "r+b") as file:
            file.seek(4 * self._width * self._end)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())
        kept: dict[str, Any] = {"cells": cells, "weight": weight}
        if block.led_back is not None:
            kept |= {f"led_back_{i}": part for i, part in enumerate(block.led_back)}
        with renewing(self._file(number)) as file:
            np.savez(file, **kept)
        self._note(cells, weight, block.led_back)

    def leave(self, n_cells: int) -> None:
        self._end += n_cells

    def unite(self, n_fields: int, ranks: Ranks) -> None:
        ranks.wait()
        self._cells, self._weights, self._led_back, self._end = [], [], [], 0
        for number in range(n_fields):
            if not self.has(number):
                raise OSError(f"{self._folder} lacks a field of view that another process was to predict")

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.npz"

    def _note(self, cells: NDArray[np.int64], weight: NDArray[np.float32], led_back: LedBack | None) -> None:
        self._cells.append(cells)
        self._weights.append(weight)
        self._end += len(cells)
        self._order = None
        if led_back is not None:
            self._led_back.append(led_back)

    def dispersion(self, target_sum: float) -> NDArray[np.float64] | None:
        return _dispersion(self._led_back, target_sum) if self._led_back else None

    @cached_property
    def _kept(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Latent and depth of all cells, read in one pass; once all FOVs are there."""
        latent = np.empty((self.n_cells, self._width - self.n_genes - 1), dtype=np.float32)
        depth = np.empty(self.n_cells, dtype=np.float32)
        step = max(1, BLOCK_BYTES // (4 * self._width))
        for start in range(0, self.n_cells, step):
            rows = slice(start, min(start + step, self.n_cells))
            block = self.blend(rows)
            latent[rows], depth[rows] = block[:, self.n_genes : -1], block[:, -1]
        return latent, depth

    @property
    def embedding(self) -> NDArray[np.float32]:
        return self._kept[0]

    @property
    def depth(self) -> NDArray[np.float32]:
        return self._kept[1]

    def blend(self, rows: slice) -> NDArray[np.float32]:
        """Blend the predictions of cells that lie together: expression, latent and depth (cells, columns)."""
        if self._order is None:
            cells = np.concatenate(self._cells)
            order = np.argsort(cells, kind="stable")
            bounds = np.searchsorted(cells[order], np.arange(self.n_cells + 1))
            self._order = order, bounds, np.concatenate(self._weights)
        order, bounds, weights = self._order
        first, last = bounds[rows.start], bounds[rows.stop]
        places = order[first:last]
        found = np.zeros((rows.stop - rows.start, self._width), dtype=np.float32)
        own = np.repeat(np.arange(len(found)), np.diff(bounds[rows.start : rows.stop + 1]))
        values = self._read(places) * weights[places, None]
        # As in memory: one FOV after the other, so that sums are the same to the last digit.
        turn = np.arange(first, last) - bounds[rows.start : rows.stop][own]
        for number in range(int(turn.max(initial=-1)) + 1):
            found[own[turn == number]] += values[turn == number]
        return found

    def _read(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the file by their numbers, runs of them at a time."""
        found = np.empty((len(places), self._width), dtype=np.float32)
        sort = np.argsort(places, kind="stable")
        ordered = places[sort]
        cuts = np.flatnonzero(np.diff(ordered) != 1) + 1
        with open(self._rows, "rb", buffering=0) as file:
            for begin, end in zip([0, *cuts], [*cuts, len(ordered)], strict=True):
                if end > begin:
                    file.seek(4 * self._width * int(ordered[begin]))
                    run = np.empty((end - begin, self._width), dtype=np.float32)
                    _fill(file, run)
                    found[sort[begin:end]] = run
        return found


BLOCK_BYTES = 64 * 2**20
"""Memory for the rows that are blended and written at a time."""


def _fill(file: Any, array: NDArray[np.float32]) -> None:
    """Read an array's bytes from where the file is."""
    view = memoryview(array.data).cast("B")
    done = 0
    while done < len(view):
        n_read = file.readinto(view[done:])
        if not n_read:
            raise OSError(f"{file.name} ends before its last row")
        done += n_read


def _dispersion(parts: list[LedBack], target_sum: float) -> NDArray[np.float64]:
    """Dispersion (genes, 2) that leads from log-normalised values back to counts, where measured and where not."""
    from .training.posterior import dispersion_of_lognorm

    counts, values, depth, seen = (np.concatenate(part) for part in zip(*parts, strict=True))
    scale = target_sum / np.maximum(depth, 1e-12)
    found = np.full((counts.shape[1], 2), np.nan)
    for number, entries in enumerate((seen, ~seen)):
        known = entries & (depth > 0)[:, None]
        if known.any():
            found[:, number] = dispersion_of_lognorm(counts, np.where(known, values, np.nan), scale)
    # Where a gene was measured, or was not, in hardly any cell, that of the other entries; without any, Poisson noise.
    found = np.where(np.isfinite(found), found, found[:, ::-1])
    return np.where(np.isfinite(found), found, 1e6)
