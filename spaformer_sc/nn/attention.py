"""Attention among the cells of each field of view (FOV), for ragged batches without padding.

The tokens of a batch lie one FOV after the other in one tensor ``(N, dim)``; ``lengths`` says how many each FOV has.
FOVs of equal length are computed together, every FOV for itself alone: no token is padded, none is masked, and the
result of a FOV does not depend on its batch mates. Graph attention goes along the edges of the spatial graph instead.

References
----------
Brody et al. 2022, "How Attentive are Graph Attention Networks?", ICLR, arXiv 2105.14491.
Choromanski et al. 2021, "Rethinking Attention with Performers", ICLR, arXiv 2009.14794.
Vaswani et al. 2017, "Attention Is All You Need", NeurIPS, arXiv 1706.03762.
Veličković et al. 2018, "Graph Attention Networks", ICLR, arXiv 1710.10903.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaformer_sc._geometric import GATv2Conv

__all__ = ["ATTENTION", "ExactAttention", "GraphAttention", "PerformerAttention", "orthogonal_features"]

_RELU_FLOOR = 1e-3
"""Added to ReLU features, so that no kernel value is 0 (Choromanski et al. 2021, Appendix A.4)."""


def orthogonal_features(n_features: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Draw random features :math:`\omega_i \sim \mathcal{N}(0, I)` that are orthogonal in blocks of `dim`.

    The directions are the columns of a Haar-distributed orthogonal matrix: the Q factor of a Gaussian matrix with the
    signs of R's diagonal moved into it (LAPACK's choice of signs alone is not isotropic, and the estimate would be
    biased). The lengths are those of independent Gaussian vectors, so chi-distributed with `dim` degrees of freedom.
    Choromanski et al. 2021, Section 2.4 and Appendix B.2.

    Parameters
    ----------
    n_features
        Number of features.
    dim
        Length of a feature, the width of one head.
    generator
        Source of randomness, on the CPU.

    Returns
    -------
    Features, ``(n_features, dim)``, float64.
    """
    n_blocks = math.ceil(n_features / dim)
    q, r = torch.linalg.qr(torch.randn(n_blocks, dim, dim, generator=generator, dtype=torch.float64))
    directions = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).transpose(-2, -1).reshape(-1, dim)
    gaussian = torch.randn(n_features, dim, generator=generator, dtype=torch.float64)
    features: Tensor = directions[:n_features] * torch.linalg.vector_norm(gaussian, dim=1, keepdim=True)
    return features


def _check_heads(dim: int, n_heads: int) -> None:
    if n_heads < 1 or dim % n_heads:
        raise ValueError(f"`n_heads={n_heads}` does not divide `dim={dim}`; choose a divisor of {dim}.")


class _Attention(nn.Module, ABC):
    """Projections and ragged batching that attention to the whole FOV shares; its kinds differ in `attend` alone."""

    def __init__(self, dim: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(dim, n_heads)
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each of B sequences of equal length; all shapes are ``(B, n_heads, length, head_dim)``."""

    def forward(self, x: Tensor, lengths: Sequence[int], edge_index: Tensor | None = None) -> Tensor:
        """Let every token attend to all tokens of its own FOV.

        Parameters
        ----------
        x
            Tokens, one FOV after the other, ``(N, dim)``.
        lengths
            Number of tokens of each FOV, each at least 1; they add up to ``N``.
        edge_index
            Not used; part of the common signature.

        Returns
        -------
        Tokens in the same order, ``(N, dim)``.

        Raises
        ------
        ValueError
            If `lengths` does not add up to the number of tokens or has an entry below 1.
        """
        if min(lengths, default=0) < 1 or sum(lengths) != len(x):
            raise ValueError(
                f"`lengths` must hold positive numbers of tokens that add up to the {len(x)} rows of `x`, "
                f"found {len(lengths)} numbers from {min(lengths, default=0)} that add up to {sum(lengths)}."
            )
        fovs = self.qkv(x).split(list(lengths))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        attended = [x] * len(fovs)
        for length, group in groupby(order, key=lengths.__getitem__):
            members = list(group)
            tokens = torch.stack([fovs[i] for i in members]) if len(members) > 1 else fovs[members[0]].unsqueeze(0)
            q, k, v = tokens.view(len(members), length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4).unbind()
            result = self.attend(q, k, v).transpose(1, 2).flatten(2)
            for i, fov in zip(members, result.unbind()):
                attended[i] = fov
        projected: Tensor = self.dropout(self.out(torch.cat(attended)))
        return projected


class PerformerAttention(_Attention):
    r"""Attention by random features (FAVOR+): time and memory grow linearly with the number of tokens.

    The kernel of a query and a key is estimated by :math:`\phi(q)^\top \phi(k)`, so that keys and values are summed
    once for all queries (Choromanski et al. 2021, eqs. 3 and 4, Algorithm 1):

    .. math:: \mathrm{Att}(Q, K, V) = D^{-1} \phi(Q) (\phi(K)^\top V), \quad D = \mathrm{diag}(\phi(Q)\phi(K)^\top 1)

    `kernel="softmax"` takes the positive features :math:`\phi(x)_i = \exp(\omega_i^\top x - \|x\|^2 / 2)` of
    :math:`x = q\,d^{-1/4}` (eqs. 6 and 7), an unbiased estimate of the softmax kernel; `kernel="relu"` takes
    :math:`\phi(x)_i = \max(\omega_i^\top x, 0) + 10^{-3}` (eq. 5 with f = ReLU, h = 1), a kernel of its own.

    Features are computed in at least float32, whatever autocast says, and stay the same until `redraw`. A fresh module
    has the same features whatever the global random state, which they leave alone.

    Parameters
    ----------
    dim
        Width of a token.
    n_heads
        Number of heads, a divisor of `dim`.
    n_features
        Number of random features, shared by the heads. By default head_dim · ⌈log(head_dim)⌉: the order d·log d of
        Choromanski et al. 2021, Section 3, in whole orthogonal blocks.
    kernel
        ``"softmax"`` or ``"relu"``.
    dropout
        Share of the output's entries that are dropped in training.

    Raises
    ------
    ValueError
        If `n_heads` does not divide `dim`, `n_features` is below 1 or `kernel` is unknown.
    """

    features: Tensor
    """Random features, ``(n_features, head_dim)``; saved with the state."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        *,
        n_features: int | None = None,
        kernel: Literal["softmax", "relu"] = "softmax",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, n_heads, dropout)
        head_dim = dim // n_heads
        if n_features is None:
            n_features = head_dim * max(1, math.ceil(math.log(head_dim)))
        if n_features < 1:
            raise ValueError(f"`n_features={n_features}` must be at least 1, or None for the default.")
        if kernel not in ("softmax", "relu"):
            raise ValueError(f"`kernel={kernel!r}` is unknown; choose 'softmax' or 'relu'.")
        self.kernel = kernel
        self.register_buffer("features", torch.empty(n_features, head_dim))
        self.redraw(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Replace the random features by new ones (Choromanski et al. 2021, Section 4.2).

        Parameters
        ----------
        generator
            Source of randomness, on the CPU whatever the module's device.
        """
        n_features, head_dim = self.features.shape
        self.features.copy_(orthogonal_features(n_features, head_dim, generator))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._attend(q, k, v)
        # A whole FOV has several times as many features as numbers in its tokens: one head at a time.
        heads = zip(*(torch.split(x, 1, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(*head) for head in heads], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            phi_q, phi_k = (self._softmax_features if self.kernel == "softmax" else self._relu_features)(
                q.to(dtype), k.to(dtype), self.features.to(dtype).T
            )
            summed = phi_q @ (phi_k.transpose(-2, -1) @ F.pad(v.to(dtype), (0, 1), value=1.0))  # [V 1] of Algorithm 1
            return (summed[..., :-1] / summed[..., -1:]).to(v.dtype)

    @staticmethod
    def _softmax_features(q: Tensor, k: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        r"""Positive features of queries and keys, scaled so that numerator and denominator neither vanish nor overflow.

        Attention does not change if :math:`\phi(q)_i` is multiplied by :math:`e^{s_i - t}` and :math:`\phi(k)_i` by
        :math:`e^{-s_i}`. With :math:`s_i` the largest exponent of feature i among the keys of the FOV and head, and t
        the largest of the query, no exponent is above 0 and the denominator is at least 1, so that no constant
        has to be added to either, and no bias comes in. The query's own :math:`-\|q\|^2/2` is part of t.
        """
        d = q.shape[-1]
        omega = omega * d**-0.25
        log_k = (k @ omega).add_(k.square().sum(-1, keepdim=True) / (-2 * math.sqrt(d)))
        shift = log_k.detach().amax(-2, keepdim=True)
        log_q = (q @ omega).add_(shift)
        return log_q.sub_(log_q.detach().amax(-1, keepdim=True)).exp_(), log_k.sub_(shift).exp_()

    @staticmethod
    def _relu_features(q: Tensor, k: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(q @ omega) + _RELU_FLOOR, F.relu(k @ omega) + _RELU_FLOOR


class ExactAttention(_Attention):
    r"""Exact softmax attention, :math:`\mathrm{softmax}(QK^\top/\sqrt{d})V` (Vaswani et al. 2017, eq. 1).

    Time grows with the square of the tokens of a FOV. The parameters are those of `PerformerAttention`, so that states
    can be exchanged (but for the Performer's buffer of features).

    Parameters
    ----------
    dim
        Width of a token.
    n_heads
        Number of heads, a divisor of `dim`.
    dropout
        Share of the output's entries that are dropped in training.

    Raises
    ------
    ValueError
        If `n_heads` does not divide `dim`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class GraphAttention(nn.Module):
    r"""Attention to the cell itself and its neighbours in the spatial graph.

    Graph attention (Veličković et al. 2018, eq. 6) with the dynamic attention of GATv2 (Brody et al. 2022, eq. 7). For
    the tokens h, in each head, whose results are concatenated and mapped by a linear layer,

    .. math:: f(h)_i = \sum_{j \in N(i) \cup \{i\}} \alpha_{ij} V h_j + b, \quad
        \alpha_{ij} = \mathrm{softmax}_j\left(a^\top \mathrm{LeakyReLU}(U h_i + V h_j)\right)

    with slope 0.2 below 0. A cell without neighbours attends to itself.

    Parameters
    ----------
    dim
        Width of a token.
    n_heads
        Number of heads, a divisor of `dim`.

    Raises
    ------
    ValueError
        If `n_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        _check_heads(dim, n_heads)
        self.graph = GATv2Conv(dim, dim // n_heads, heads=n_heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Sequence[int], edge_index: Tensor | None = None) -> Tensor:
        """Let every token attend to itself and to its neighbours.

        Parameters
        ----------
        x
            Tokens, one FOV after the other, ``(N, dim)``.
        lengths
            Not used; part of the common signature.
        edge_index
            Graph between the tokens, ``(2, E)`` int64, every edge in both directions, none between FOVs. Self-loops
            make no difference.

        Returns
        -------
        Tokens in the same order, ``(N, dim)``.

        Raises
        ------
        ValueError
            If `edge_index` is None.
        """
        if edge_index is None:
            raise ValueError(
                "`edge_index` is None, but graph attention needs the edges between the tokens, shape (2, E); "
                "a batch without edges has shape (2, 0)."
            )
        projected: Tensor = self.out(self.graph(x, edge_index))
        return projected


Attention = PerformerAttention | ExactAttention | GraphAttention

ATTENTION: dict[str, Callable[[int, int], Attention]] = {
    "performer": PerformerAttention,
    "performer_relu": partial(PerformerAttention, kernel="relu"),
    "exact": ExactAttention,
    "gat": GraphAttention,
}
"""Attention by name, to be called with the width of a token and the number of heads."""
