"""Plots of a result: in space, of what can be believed, and of the training."""

from __future__ import annotations

from ._plots import calibration, history, imputed, reliability

__all__ = ["calibration", "history", "imputed", "reliability"]
