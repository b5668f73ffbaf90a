"""Interpretation: what moved an imputed value, and from how far."""

from __future__ import annotations

from spaformer_sc.interpret._attribution import Attribution, attribution
from spaformer_sc.interpret._reach import Reach, reach

__all__ = ["Attribution", "Reach", "attribution", "reach"]
