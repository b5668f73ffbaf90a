"""The progress bar."""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any


class ProgressBar:
    """Progress bar over training steps, with the validation score, or other units; silent if not enabled.

    Parameters
    ----------
    label
        What goes on.
    enabled
        Whether to show it.
    first, n_parts
        Number of the first part of the work that it shows, from 0, and number of parts of all the work.
    unit
        What is counted.
    """

    def __init__(self, label: str, enabled: bool, first: int = 0, n_parts: int = 1, unit: str = "step") -> None:
        self._label, self._enabled, self._first, self._n_parts, self._unit = label, enabled, first, n_parts, unit
        self._bar: Any = None
        self._lock = threading.Lock()
        self._done: dict[int, int] = {}
        self._planned: dict[int, int] = {}
        self._best = -math.inf

    def __enter__(self) -> ProgressBar:
        self._bar = self._made()
        return self

    def plan(self, part: int, n_steps: int) -> None:
        """Count on a part of the work that has not begun."""
        self._planned[part] = n_steps

    def update(self, step: int, n_steps: int, score: float = -math.inf, part: int = 0) -> None:
        """Move a part to ``step`` of ``n_steps``; the best score of all parts is shown."""
        with self._lock:
            self._done[part], self._planned[part] = step, n_steps
            self._best = max(self._best, score)
            self._bar.total = sum(self._planned.values())
            if math.isfinite(self._best):
                self._bar.set_postfix_str(f"best held-out gain {self._best:.3f}", refresh=False)
            self._bar.update(sum(self._done.values()) - self._bar.n)

    def _made(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm's advice on ipywidgets
            from tqdm.auto import tqdm

        numbers = sorted({self._first + 1, self._first + max(1, len(self._planned))})
        parts = f" {'-'.join(map(str, numbers))}/{self._n_parts}" if self._n_parts > 1 else ""
        total = sum(self._planned.values()) or None
        return tqdm(desc=self._label + parts, total=total, unit=self._unit, disable=not self._enabled, leave=True)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
