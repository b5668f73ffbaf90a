"""The state of a fit on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from spaformer_sc._files import lock, renewing
from spaformer_sc._logging import logger

RUN = "run.json"
"""File that says what run the states are of."""

FRESH = "run.json.fresh"
"""The same while it is written."""

LOCK = "lock"
"""Empty file that a run keeps locked as long as it writes; the system unlocks it when the process ends or is killed."""

INTERVAL = 30.0
"""Seconds between two states of a training that are kept, at least."""


class Checkpoint:
    """Named states in a folder, each replaced whole: numbers, strings and tensors in lists and dictionaries.

    Loading executes nothing (``torch.load`` with ``weights_only``).

    Parameters
    ----------
    folder
        Where the states are.
    resume
        Go on from the states that are there; otherwise they are removed when the run begins.
    choices
        What was asked for, numbers, strings, lists and dictionaries: a run goes on only where it is the same.

    Attributes
    ----------
    writes
        Whether this process changes the folder; of several that train together only one does, and the others read.
    """

    def __init__(self, folder: Path, *, resume: bool, choices: dict[str, Any]) -> None:
        self._folder, self._resume, self._choices = folder, resume, choices
        self._begin, self._saved = time.monotonic(), dict[str, float]()
        self._begun = False
        self._lock: BinaryIO | None = None
        self.writes = True

    def __getstate__(self) -> dict[str, Any]:
        """The lock stays with the process that took it."""
        return {**vars(self), "_lock": None}

    def begin(self, found: dict[str, Any]) -> None:
        """Make the folder, or check that what is there belongs to the same run.

        Parameters
        ----------
        found
            What the data are and what the fit is, beside what was asked for.

        Raises
        ------
        ValueError
            If the states are of other data or choices, or another run is writing them.
        """
        if not self.writes:
            return
        run = json.loads(json.dumps({**self._choices, **found}))
        if self._folder.exists() and self._kept_run() is None and any(p.name != FRESH for p in self._content()):
            raise ValueError(f"{self._folder} is in the way of what this run keeps; move it elsewhere.")
        self._hold()
        kept = self._kept_run()
        if self._resume and kept is not None:
            different = [name for name in sorted(run.keys() | kept.keys()) if run.get(name) != kept.get(name)]
            if different:
                raise ValueError(
                    f"`resume=True`: {self._folder} holds a run that differs in {', '.join(different)}; pass what it "
                    "was started with, or resume=False to start anew."
                )
            logger.info("going on with the run in %s", self._folder)
        else:
            if kept is not None:
                logger.info("starting anew: what an unfinished run has done is discarded (resume=True goes on from it)")
            self._clear()
            fresh = self._folder / FRESH
            fresh.write_text(json.dumps(run), encoding="utf-8")
            os.replace(fresh, self._folder / RUN)
        self._begun = True

    def _kept_run(self) -> dict[str, Any] | None:
        """What the run in the folder says of itself; None where there is none."""
        try:
            kept = json.loads((self._folder / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) and {"version", "data"} <= kept.keys() else None

    def _hold(self) -> None:
        """Make the folder and lock it against other runs."""
        while self._lock is None:
            self._folder.mkdir(exist_ok=True)
            try:
                file = (self._folder / LOCK).open("ab")
            except FileNotFoundError:
                continue  # the run that had the folder has just removed it
            try:
                lock(file.fileno())
            except BlockingIOError:
                file.close()
                raise ValueError(
                    f"another run is writing {self._folder}: wait for its end, or choose another `output_path`."
                ) from None
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): make sure that no other run writes there.", self._folder, error
                )
            self._lock = file
            try:
                is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(self._folder / LOCK))
            except FileNotFoundError:
                is_there = False
            if not is_there:
                file.close()
                self._lock = None

    def _content(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name != LOCK]

    def _clear(self) -> None:
        """Empty the folder; a kill on the way leaves nothing that looks like a run."""
        (self._folder / RUN).unlink(missing_ok=True)
        for path in self._content():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Remove the folder, unless the run was interrupted after it had done something."""
        if self._lock is None:
            return
        with self._lock:
            if not self._begun:
                return
            done = (path for path in self._folder.rglob("*") if path.is_file() and path.stat().st_size)
            if failed is not None and any(path.name != RUN for path in done):
                logger.warning("what the run has done is in %s; resume=True goes on from there.", self._folder)
                return
            self._clear()
            if sys.platform == "win32":  # where an open file cannot be removed
                self._lock.close()
            with suppress(OSError):  # another run may begin as soon as the lock is gone
                (self._folder / LOCK).unlink()
                self._folder.rmdir()

    def due(self, name: str) -> bool:
        """Whether the last state of a name was kept long enough ago for another."""
        return self.writes and time.monotonic() - self._saved.get(name, self._begin) >= INTERVAL

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep a state under a name in place of an earlier one."""
        if not self.writes:
            return
        with renewing(self._folder / f"{name}.pt") as file:
            torch.save(state, file)
        self._saved[name] = time.monotonic()

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the state of a name; None if there is none.

        Raises
        ------
        ValueError
            If it cannot be read.
        """
        path = self._folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes of it
            raise ValueError(f"{path} is damaged; pass resume=False to start anew.") from error
        return state

    def drop(self, name: str) -> None:
        """Forget the state of a name."""
        if self.writes:
            (self._folder / f"{name}.pt").unlink(missing_ok=True)
