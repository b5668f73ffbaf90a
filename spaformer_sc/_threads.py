"""Threads that give way to others."""

from __future__ import annotations

import os
import sys


def wait_patiently() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has set how they wait.

    By default threads that wait for each other keep a core busy. On a shared computer this makes two threads beside
    another busy process several times slower than one. OpenMP reads the setting when torch loads it, so this has to
    come before torch is first imported; later it does nothing.
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
