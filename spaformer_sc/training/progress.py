"""The progress bar."""

from __future__ import annotations

import math
import warnings
from typing import Any


class ProgressBar:
    """Progress bar over training steps, with the validation score, or other units; silent if not enabled."""

    def __init__(self, label: str, enabled: bool, unit: str = "step") -> None:
        self._label, self._enabled, self._unit = label, enabled, unit
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, step: int, n_steps: int, score: float = math.nan) -> None:
        """Move to ``step`` of ``n_steps``."""
        if self._bar is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tqdm's advice on ipywidgets
                from tqdm.auto import tqdm

            self._bar = tqdm(total=n_steps, desc=self._label, unit=self._unit, disable=not self._enabled, leave=True)
        self._bar.total = n_steps
        self._bar.update(step - self._bar.n)
        if math.isfinite(score):
            self._bar.set_postfix_str(f"best held-out gain {score:.3f}", refresh=False)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
