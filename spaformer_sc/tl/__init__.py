"""Tools: what changes an AnnData."""

from __future__ import annotations

from ._impute import impute

__all__ = ["impute"]
