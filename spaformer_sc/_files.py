"""Writing to disk so that either the old file or the whole new one is there."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside the target to write a file or folder to; put it in the target's place when all went well.

    On any error, and on an interrupt, the target stays as it was and what was written so far is removed.

    Parameters
    ----------
    path
        The file or folder to replace or to make.
    """
    target = Path(path).absolute()
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = staging / target.name
        yield fresh
        for file in [fresh] if fresh.is_file() else sorted(p for p in fresh.rglob("*") if p.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if not target.is_dir():
            os.replace(fresh, target)
        elif not _exchange(fresh, target):
            # The old folder steps aside, and comes back if the new one fails.
            old = staging / "old"
            try:
                os.replace(target, old)
                os.replace(fresh, target)
            except BaseException:
                if old.exists() and not target.exists():
                    os.replace(old, target)
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places in one step; False where system or file system cannot."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return bool(exchange(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


@contextmanager
def renewing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of a small one, or is made, when all went well; else it is removed.

    Parameters
    ----------
    path
        The file. What is written so far is beside it, with the ending ``.fresh``.
    """
    fresh = path.with_suffix(".fresh")
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def lock(file: int) -> None:
    """Lock an open file against whoever else calls this; its end is that of the process, or when the file is closed.

    Parameters
    ----------
    file
        Descriptor, open for writing.

    Raises
    ------
    BlockingIOError
        If another has locked it.
    OSError
        If the file system cannot lock.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, "locked by another") from error
        raise
