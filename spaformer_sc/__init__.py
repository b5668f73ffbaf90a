"""Impute missing gene expression in cell-resolution spatial transcriptomics."""

from __future__ import annotations

__version__ = "0.1.0"
