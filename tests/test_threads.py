"""How threads wait: asked for before torch loads, and only where the user has not said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
{before}
from spaformer_sc.model import resolve_device
resolve_device("cpu")
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("environment", "before", "expected"),
    [
        ({}, "", "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "", "ACTIVE"),
        ({"GOMP_SPINCOUNT": "100"}, "", "None"),
        ({}, "import torch", "None"),
    ],
)
def test_threads_wait_without_spinning_unless_told(environment: dict[str, str], before: str, expected: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    program = [sys.executable, "-c", PROGRAM.format(before=before)]
    done = subprocess.run(program, env=clean | environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
