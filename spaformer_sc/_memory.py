"""How much memory a fit takes, told before it is taken."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from ._logging import logger

PACKAGES = 900 * 2**20
"""Memory of the imported packages themselves, roughly."""

BLOCK = 512
"""Cells of which matrices with all genes are in memory at a time, for each thread that predicts."""

VIEW = 16
"""Bytes of a count in a view of a FOV: its place, what is shown, what is asked for, and the normalised value."""

MASKS = 7
"""Bytes of an entry in the masks of a view: what is visible (twice), what is asked for and what was measured."""

COPIES = 7
"""Numbers kept of each weight in training: itself, gradient, two moments, average, its best and the one before."""

JUDGING = 64 * 2**20
"""Memory of what is computed, block by block, to judge a fit and its intervals."""


def state_memory(
    n_cells: int,
    n_genes: int,
    n_counts: int,
    largest_fov: int,
    step: int,
    buffer: int,
    n_inputs: int,
    n_decoded: int,
    width: int,
    all_widths: int,
    weights: int,
    all_weights: int,
    n_trainings: int,
    n_threads: int,
    masked: bool,
    hides: bool,
    pooled: bool,
    kept: int,
    n_workers: int = 0,
) -> int:
    """Log the memory that a fit will take at its peak, and refuse to start where there is less.

    Parameters
    ----------
    n_cells, n_genes
        Size of what is fitted.
    n_counts
        Number of non-zero counts.
    largest_fov
        Cells of the largest FOV or tile, margin included.
    step
        Cells in a training step.
    buffer
        Bytes of the training loop's buffer.
    n_inputs
        Matrices of expression that the network reads.
    n_decoded
        Matrices of cells × genes that decoding takes at once.
    width, all_widths
        Numbers that the largest encoder computes of a cell at a time, and that all networks keep of it.
    weights, all_weights
        Weights of the largest network, and of all of them together.
    n_trainings, n_threads
        Networks that are trained, and blocks of cells that are predicted, at the same time.
    masked
        Whether entries are missing, so that masks of all cells and genes are kept.
    hides
        Whether the training hides entries, or some are missing, so that views have masks.
    pooled
        Whether the counts of cells alike come in, for which the mean share of a FOV's cells and all genes is kept.
    kept
        Bytes of the result that stays in memory.
    n_workers
        Processes that this one starts for the training.

    Returns
    -------
    The estimate in bytes.

    Raises
    ------
    MemoryError
        If that is more than what is free.
    """
    dense = 4 * n_cells * n_genes
    masks = n_cells * n_genes * 5 if masked else 0  # the user's, what is held out, both, and their parts by FOV
    sparse = 6 * 8 * n_counts  # value and column of the counts, their three parts, and what is drawn to part them
    seen = VIEW * n_counts + (MASKS * n_cells * n_genes if hides else 0)
    # The views of the next FOVs are made while those before are in use.
    views = 2 * min(buffer, seen)
    training = views + 4 * step * n_genes * (2 * n_decoded + n_inputs) + 4 * weights * (COPIES - 1)
    validation = seen * largest_fov // n_cells + 4 * largest_fov * width
    whole = validation + 4 * largest_fov * all_widths
    evidence = 4 * largest_fov * n_genes * (2 if masked else 1) if pooled else 0
    blocks = n_threads * 4 * BLOCK * n_genes * (n_decoded + n_inputs + 3 * pooled)
    prediction = whole + evidence + blocks + 4 * largest_fov * n_genes
    scoring = dense + max(prediction, dense + JUDGING)
    fit = max(n_trainings * (training + validation), whole + evidence + blocks, scoring)
    networks = 4 * all_weights
    workers = n_workers * (PACKAGES + sparse + masks + networks + whole + max(training, evidence + blocks))
    need = PACKAGES + sparse + masks + networks + max(fit, kept + prediction, workers)
    free = available_memory()
    logger.info("memory: about %d MiB at the peak, of which %d MiB for the result", need >> 20, kept >> 20)
    if free is not None and need > free + PACKAGES:
        way_out = " or leave counts and result on disk (anndata.read_h5ad(path, backed='r') and `output_path=`)"
        raise MemoryError(
            f"this takes about {need / 2**30:.1f} GiB of memory and only {free / 2**30:.1f} GiB are free: close other "
            f"programs, take a smaller `tile_size`,{way_out if kept else ' or fewer cells'}."
        )
    return need


def give_back() -> None:
    """Return to the system what has been freed; with glibc it stays with the process otherwise, in pieces."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def state_disk(folder: Path, *, result: int, until_whole: int, there: int) -> None:
    """Log the space that a result takes that is written FOV by FOV, and refuse to start where there is less.

    Parameters
    ----------
    folder
        Where it is written.
    result
        Bytes of the output.
    until_whole
        Bytes that the predictions take until the output is there.
    there
        Bytes that an unfinished run has taken already.

    Raises
    ------
    OSError
        If the space is not there.
    """
    free = shutil.disk_usage(folder).free + there
    logger.info("disk: about %d MiB for the output, and %d MiB until it is whole", result >> 20, until_whole >> 20)
    if result + until_whole > free:
        raise OSError(
            f"{folder} has {free / 2**30:.1f} GiB of free space, and about {(result + until_whole) / 2**30:.1f} GiB "
            "are needed: give an `output_path` on another disk."
        )


def size_on_disk(path: str | os.PathLike[str] | None) -> int:
    """Bytes of a file or folder; 0 for none."""
    if path is None:
        return 0
    place = Path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def available_memory() -> int | None:
    """Bytes of memory, swap space included, that programs can still take, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        if "MemAvailable" in sizes:
            return sizes["MemAvailable"] + sizes.get("SwapFree", 0)
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
