"""Impute missing gene expression in cell-resolution spatial transcriptomics.

``import spaformer_sc as sf`` is light: torch, torch-geometric and squidpy load when first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = ("datasets", "metrics", "pl", "pp", "tl")

if TYPE_CHECKING:
    from . import datasets, metrics, pl, pp, tl
    from ._settings import settings
    from .model import SpaFormer

__all__ = ["SpaFormer", "__version__", "datasets", "metrics", "pl", "pp", "settings", "tl"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "SpaFormer":
        from .model import SpaFormer

        return SpaFormer
    if name == "settings":
        from ._settings import settings

        return settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
