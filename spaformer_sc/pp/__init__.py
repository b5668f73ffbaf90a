"""Preparing data."""

from __future__ import annotations

from spaformer_sc.pp._centroids import centroids
from spaformer_sc.pp._check import check
from spaformer_sc.pp._positional_encoding import positional_encoding
from spaformer_sc.pp._tile import tile

__all__ = ["centroids", "check", "positional_encoding", "tile"]
