"""Encodings of a cell's coordinates: linear, perceptron, sinusoids, random Fourier features.

Coordinates are in typical distances between neighbours, counted from the mean of the field of view (FOV).

References
----------
Rahimi & Recht 2007, "Random Features for Large-Scale Kernel Machines", NeurIPS 20.
Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains",
NeurIPS 33, arXiv 2006.10739.
Vaswani et al. 2017, "Attention Is All You Need", NeurIPS 30, arXiv 1706.03762.
Wang & Liu 2019, "Translating Math Formula Images to LaTeX Sequences Using Deep Neural Networks with Sequence-level
Training", arXiv 1908.11415.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spaformer_sc._geometric import Data
from spaformer_sc.positional._base import PositionalEncoding

POSITION_SCALE = 30.0
"""Typical distances that make 1 at the input of `LinearEncoding` and `MLPEncoding`: half the side of a square FOV of
about 4,000 cells."""
SHORTEST_WAVE, LONGEST_WAVE = 4.0, 1000.0
"""Wavelengths of `SinusoidalEncoding`, in typical distances, from cells next to each other to whole slides."""
BANDWIDTH = 10.0
"""Standard deviation of the Gaussian kernel of `FourierEncoding`, in typical distances."""
_SEED = 0
"""Of the frequencies of `FourierEncoding`."""


def positions(data: Data) -> Tensor:
    """Return the positions of one FOV, ``(n, 2)`` float32, in typical distances.

    Raises
    ------
    ValueError
        If `data` has none.
    """
    if data.pos is None:
        raise ValueError("`data.pos` is None, but this encoding needs the positions of cells; pass them, shape (n, 2).")
    return data.pos.float()  # type: ignore[no-any-return]


class CoordinateEncoding(PositionalEncoding):
    """Learned map of fixed functions of the position.

    A subclass gives the functions, `basis`, and the learned map, `learned`.
    """

    feature_names = ("position",)
    learned: nn.Module

    def features(self, data: Data) -> dict[str, Tensor]:
        return {"position": positions(data)}

    @abstractmethod
    def basis(self, position: Tensor) -> Tensor:
        """Evaluate the fixed functions, of order 1, at positions ``(N, 2)`` in typical distances: one row for each."""

    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        encoding: Tensor = self.learned(self.basis(features["position"]))
        return encoding


class LinearEncoding(CoordinateEncoding):
    """Linear map of the position, divided by `POSITION_SCALE`. It grows without bound with the size of the FOV.

    Parameters
    ----------
    dim
        Width of the encoding.
    """

    name = "linear"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.learned = nn.Linear(2, dim, bias=False)

    def basis(self, position: Tensor) -> Tensor:
        return position / POSITION_SCALE


class MLPEncoding(CoordinateEncoding):
    """Perceptron of the position, divided by `POSITION_SCALE`, with one hidden layer as wide as the encoding.

    Parameters
    ----------
    dim
        Width of the encoding.
    """

    name = "mlp"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.learned = nn.Sequential(nn.Linear(2, dim), nn.ReLU(), nn.Linear(dim, dim))

    def basis(self, position: Tensor) -> Tensor:
        return position / POSITION_SCALE


class SinusoidalEncoding(CoordinateEncoding):
    r"""Linear map of sinusoids of x and of y.

    For each coordinate c and each of k wavelengths λ there are

    .. math:: \sin(2\pi c / \lambda_j), \; \cos(2\pi c / \lambda_j), \quad
        \lambda_j = \lambda_1 (\lambda_k / \lambda_1)^{(j - 1) / (k - 1)}

    from `SHORTEST_WAVE` to `LONGEST_WAVE` (Vaswani et al. 2017, Section 3.5, for two coordinates as in Wang & Liu
    2019). The inner product of the sinusoids of two cells is the sum of :math:`\cos(2\pi\Delta / \lambda_j)` over
    wavelengths and coordinates, a function of their displacement alone.

    Parameters
    ----------
    dim
        Width of the encoding.
    k
        Number of wavelengths; there are 4k sinusoids.
    """

    name = "sinusoidal"
    options = ("k",)
    frequencies: Tensor

    def __init__(self, dim: int, *, k: int = 10) -> None:
        super().__init__(dim)
        wavelengths = np.geomspace(SHORTEST_WAVE, LONGEST_WAVE, k)
        self.register_buffer("frequencies", torch.from_numpy(2 * math.pi / wavelengths).float())
        self.learned = nn.Linear(4 * k, dim, bias=False)

    def basis(self, position: Tensor) -> Tensor:
        phase = (position[:, :, None] * self.frequencies).flatten(1)
        return torch.cat([phase.sin(), phase.cos()], 1)


class FourierEncoding(CoordinateEncoding):
    r"""Linear map of random Fourier features of the position.

    They are :math:`\cos(\omega_j \cdot p)` and :math:`\sin(\omega_j \cdot p)` for m random frequencies
    :math:`\omega_j \sim N(0, \sigma^{-2} I)` (Tancik et al. 2020, eq. 5). The inner product of the features of two
    cells at distance d, divided by m, approximates the Gaussian kernel :math:`\exp(-d^2 / 2\sigma^2)` with a standard
    error of at most :math:`1 / \sqrt{2m}` (Rahimi & Recht 2007, Section 3). σ is `BANDWIDTH`. The frequencies come from
    a fixed seed and are saved with the weights.

    Parameters
    ----------
    dim
        Width of the encoding.
    n_frequencies
        Number m of frequencies; there are 2m features.
    """

    name = "fourier"
    options = ("n_frequencies",)
    frequencies: Tensor

    def __init__(self, dim: int, *, n_frequencies: int = 64) -> None:
        super().__init__(dim)
        normal = np.random.default_rng(_SEED).standard_normal((n_frequencies, 2))
        self.register_buffer("frequencies", torch.from_numpy(normal / BANDWIDTH).float())
        self.learned = nn.Linear(2 * n_frequencies, dim, bias=False)

    def basis(self, position: Tensor) -> Tensor:
        phase = (position[:, None, :] * self.frequencies).sum(2)
        return torch.cat([phase.cos(), phase.sin()], 1)
