"""Positional encodings: from the graph and the coordinates of a field of view to vectors that join tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from spaformer_sc.nn.seeding import seeded
from spaformer_sc.positional._base import CombinedEncodings, PositionalEncoding
from spaformer_sc.positional.conditional import ConditionalEncoding, ConditionalGATEncoding
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
    "CombinedEncodings",
    "ConditionalEncoding",
    "ConditionalGATEncoding",
    "CoordinateEncoding",
    "FourierEncoding",
    "LaplacianEncoding",
    "LinearEncoding",
    "MLPEncoding",
    "PatchEncoding",
    "PositionalEncoding",
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
        ConditionalEncoding,
        ConditionalGATEncoding,
    )
}
"""Encodings by name."""


def build_positional(
    names: str | Sequence[str],
    dim: int,
    *,
    k: int = 10,
    n_frequencies: int = 64,
    patch_size: float | None = None,
    combine: str = "add",
) -> CombinedEncodings:
    """Build the named encodings.

    Weights follow torch's random state, of which exactly one number is used: those of an encoding do not depend on
    which others there are, nor on how they are combined.

    Parameters
    ----------
    names
        Name or names of encodings.
    dim
        Width of the encodings and of tokens.
    k
        Number of eigenvectors of ``laplacian`` and ``signnet``, steps of ``random_walk``, wavelengths of
        ``sinusoidal``.
    n_frequencies
        Number of frequencies of ``fourier``.
    patch_size
        Side of a bin of ``patch``, in the unit of the coordinates; None for 10 typical distances between neighbours.
    combine
        ``"add"`` or ``"concat"``, see :class:`CombinedEncodings`.

    Returns
    -------
    The encodings, ready to be combined with tokens.

    Raises
    ------
    ValueError
        If there is no name, one is unknown or one is given twice.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names or len(set(names)) < len(names) or not POSITIONAL.keys() >= set(names):
        raise ValueError(f"`positional={names!r}` must be one or more distinct names out of: {', '.join(POSITIONAL)}.")
    given: dict[str, Any] = {"k": k, "n_frequencies": n_frequencies, "patch_size": patch_size}
    base = int(torch.randint(2**62, ()))
    encodings = []
    for name in names:
        chosen = POSITIONAL[name]
        with seeded(zlib.crc32(f"{base} {name}".encode())):
            encodings.append(chosen(dim, **{option: given[option] for option in chosen.options}))
    with seeded(zlib.crc32(f"{base} combination".encode())):
        return CombinedEncodings(encodings, combine=combine)
