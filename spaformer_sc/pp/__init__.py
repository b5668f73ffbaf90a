"""Preparing data."""

from __future__ import annotations

from spaformer_sc.pp._tile import tile

__all__ = ["tile"]
