"""Positional encodings: from the graph and the coordinates of a field of view to vectors that are added to tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from spaformer_sc.nn.seeding import seeded
from spaformer_sc.positional._base import PositionalEncoding, PositionalSum
from spaformer_sc.positional.coordinate import (
    CoordinateEncoding,
    FourierEncoding,
    LinearEncoding,
    MLPEncoding,
    SinusoidalEncoding,
)
from spaformer_sc.positional.laplacian import LaplacianEncoding, laplacian_eigenvectors
from spaformer_sc.positional.patch import PatchEncoding
from spaformer_sc.positional.random_walk import RandomWalkEncoding, landing_probabilities
from spaformer_sc.positional.signnet import SignNetEncoding

__all__ = [
    "POSITIONAL",
    "CoordinateEncoding",
    "FourierEncoding",
    "LaplacianEncoding",
    "LinearEncoding",
    "MLPEncoding",
    "PatchEncoding",
    "PositionalEncoding",
    "PositionalSum",
    "RandomWalkEncoding",
    "SignNetEncoding",
    "SinusoidalEncoding",
    "build_positional",
    "landing_probabilities",
    "laplacian_eigenvectors",
]

POSITIONAL: dict[str, type[PositionalEncoding]] = {
    encoding.name: encoding
    for encoding in (
        LaplacianEncoding,
        SignNetEncoding,
        RandomWalkEncoding,
        PatchEncoding,
        LinearEncoding,
        MLPEncoding,
        SinusoidalEncoding,
        FourierEncoding,
    )
}
"""Encodings by name."""


def build_positional(names: str | Sequence[str], dim: int, *, k: int = 10) -> PositionalSum:
    """Build the sum of the named encodings.

    Weights follow torch's random state, of which exactly one number is used: those of an encoding do not depend on
    which others there are.

    Parameters
    ----------
    names
        Name or names of encodings.
    dim
        Width of the encoding.
    k
        Number of features of each cell, for encodings that leave a choice: eigenvectors, steps, frequencies.

    Returns
    -------
    The sum.

    Raises
    ------
    ValueError
        If there is no name, one is unknown or one is given twice.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names or len(set(names)) < len(names) or not POSITIONAL.keys() >= set(names):
        raise ValueError(f"`positional={names!r}` must be one or more distinct names out of: {', '.join(POSITIONAL)}.")
    base = int(torch.randint(2**62, ()))
    encodings = []
    for name in names:
        with seeded(zlib.crc32(f"{base} {name}".encode())):
            encodings.append(POSITIONAL[name](dim, k))
    return PositionalSum(encodings)
