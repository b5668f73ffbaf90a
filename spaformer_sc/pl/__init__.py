"""Plots: a result in space, what can be believed of it, its training, what moved it; and a report of it all."""

from __future__ import annotations

from ._encodings import encodings
from ._plots import calibration, history, imputed, reliability

__all__ = ["calibration", "encodings", "history", "imputed", "reliability"]
