"""Tools: impute, say what is known of what was imputed, and explain it."""

from __future__ import annotations

from spaformer_sc.interpret import attribution, reach

from ._evaluate import evaluate
from ._impute import impute
from ._uncertainty import Interval, detection, interval, sample

__all__ = ["Interval", "attribution", "detection", "evaluate", "impute", "interval", "reach", "sample"]
