"""Tools: impute, and explain what was imputed."""

from __future__ import annotations

from spaformer_sc.interpret import attribution, reach

from ._impute import impute

__all__ = ["attribution", "impute", "reach"]
