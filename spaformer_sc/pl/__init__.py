"""Plots: a result in space, what can be believed of it, its training, what moved it; and a report of it all."""

from __future__ import annotations

from ._encodings import encodings
from ._influence import influence, reach
from ._plots import calibration, history, imputed, reliability
from ._report import report

__all__ = ["calibration", "encodings", "history", "imputed", "influence", "reach", "reliability", "report"]
