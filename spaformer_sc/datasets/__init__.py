"""Data to try things on: a simulated tissue whose truth is known, and real sets by download."""

from __future__ import annotations

from ._download import cosmx_nsclc, xenium_mouse_brain
from ._simulated import simulated_tissue

__all__ = ["cosmx_nsclc", "simulated_tissue", "xenium_mouse_brain"]
