"""The state of a fit on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from spaformer_sc._logging import logger

RUN = "run.json"
"""File that says what run the states are of."""

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
        self._saved = time.monotonic()
        self._begun = False
        self.writes = True

    def begin(self, found: dict[str, Any]) -> None:
        """Make the folder, or check that what is there belongs to the same run.

        Parameters
        ----------
        found
            What the data are and what the fit is, beside what was asked for.

        Raises
        ------
        ValueError
            If the states are of other data or choices.
        """
        if not self.writes:
            return
        run = json.loads(json.dumps({**self._choices, **found}))
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
            if kept is None and self._folder.exists() and any(self._folder.iterdir()):
                raise ValueError(f"{self._folder} is in the way of what this run keeps; move it elsewhere.")
            self._remove()
            self._folder.mkdir()
            fresh = self._folder / f"{RUN}.fresh"
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

    def _remove(self) -> None:
        """Remove the folder; a kill on the way leaves nothing that looks like a run."""
        (self._folder / RUN).unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Remove the folder, unless the run was interrupted after it had done something."""
        if not self._begun:
            return
        done = (path for path in self._folder.rglob("*") if path.is_file() and path.stat().st_size)
        if failed is not None and any(path.name != RUN for path in done):
            logger.warning("what the run has done is in %s; resume=True goes on from there.", self._folder)
        else:
            self._remove()

    @property
    def due(self) -> bool:
        """Whether the last state was kept long enough ago for another."""
        return self.writes and time.monotonic() - self._saved >= INTERVAL

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep a state under a name in place of an earlier one."""
        if not self.writes:
            return
        fresh = self._folder / f"{name}.fresh"
        with open(fresh, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._folder / f"{name}.pt")
        self._saved = time.monotonic()

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
