"""What the benchmark commands share: results files, memory and threads of a run."""

from __future__ import annotations

import csv
import os
import resource
import sys
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def pinned_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process with a fixed number of threads."""
    return os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))


def peak_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def checksum(parts: Iterable[bytes]) -> str:
    """Return a checksum of bytes."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def package_files() -> list[Path]:
    """Return the source files of the package beside this folder that decide what is predicted."""
    package = Path(__file__).resolve().parent.parent / "spaformer_sc"
    folders = [package / name for name in ("data", "metrics", "nn", "positional", "training")]
    found = {package / "model.py", package / "_config.py", package / "_checks.py"}
    found |= {file for folder in folders for file in folder.rglob("*.py")}
    judging = ("posterior.py", "progress.py", "reliability.py", "scoring.py")
    return sorted(found - {package / "training" / name for name in judging})


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read a results file; no rows if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or tuple(reader.fieldnames) != tuple(columns):
            raise SystemExit(f"{path}: not a results file of this command (its columns differ); name another.")
        return list(reader)


def write_rows(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    """Write a results file in one step, so that an interrupted run leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
