"""The network: cells of a field of view in, distribution of their expression out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .decoders import DECODERS, Decoded, Decoder, at_least_float32, full_depth
from .encoder import Encoder
from .seeding import seeded

DROPOUT = 0.2
"""Dropout of a perceptron, in training."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and choices of a :class:`Network`.

    Attributes
    ----------
    n_genes
        Number of genes.
    dim, n_layers, n_heads, feedforward
        Width of a token, number of encoder layers, attention heads, and width of the feed-forward block in ``dim``.
    n_latent
        Size of the latent.
    encoder, decoder
        Names in :data:`~spaformer_sc.nn.encoder.ENCODERS` and :data:`~spaformer_sc.nn.decoders.DECODERS`.
    variational
        Sample the latent from a Gaussian in training and penalise its divergence from the standard normal.
    hops
        Number of rings of spatial neighbours (0, 1 or 2) whose mean expression is a further input of a token.
    posterior
        Gamma-Poisson update with the cell's own counts (count decoders).
    dropout
        Dropout in the encoder.
    target_sum
        Depth to which expression is normalised at the input, and at the output of the Gaussian decoder.
    dispersion
        What the dispersion of ``nb`` and ``zinb`` depends on: ``"gene"``, ``"gene_fov"`` or ``"entry"``.
    fovs
        Names of the FOVs of the fit, for ``dispersion="gene_fov"``.
    wide
        A linear path from the token to the decoder's output, beside encoder and latent.
    perceptron
        The latent is the one hidden layer of a perceptron from token to genes, with dropout of :data:`DROPOUT` on what
        it reads and on what it gives.
    """

    n_genes: int
    dim: int
    n_layers: int
    n_heads: int
    feedforward: int
    n_latent: int
    encoder: str
    decoder: str
    variational: bool
    hops: int
    posterior: bool
    dropout: float
    target_sum: float
    dispersion: str = "gene"
    fovs: tuple[str, ...] = ()
    wide: bool = False
    perceptron: bool = False


@dataclass(frozen=True)
class Positions:
    """What the positional encodings of one FOV need.

    Attributes
    ----------
    features
        Features by name: of the whole FOV if the encoding needs the graph, else of the tokens alone.
    edge_index
        Symmetric spatial graph (2, edges) of the whole FOV, or None.
    rows
        Cells of the FOV that are tokens (tokens,), or None when ``features`` holds just those.
    """

    features: dict[str, Tensor]
    edge_index: Tensor | None
    rows: Tensor | None


@dataclass(frozen=True)
class Tokens:
    """A ragged batch: tokens of one or more FOVs, one FOV after the other.

    Attributes
    ----------
    values
        Input expression, log1p of visible counts normalised to the target sum (tokens, genes); one matrix for the cells
        themselves, then one for each ring of neighbours.
    counts
        Visible counts (tokens, genes).
    depth
        Depth estimated from the visible counts (tokens,).
    visible
        Which entries are shown (tokens, genes), or None when all are.
    lengths
        Number of tokens of each FOV.
    positions
        One per FOV, or None when the network has no positional encoding.
    edge_index
        Symmetric spatial graph between the tokens (2, edges), without edges between FOVs; None when the network reads
        none.
    fovs
        Names of the FOVs, one for each of ``lengths``; tiles have the name of the image they are cut from.
    """

    values: tuple[Tensor, ...]
    counts: Tensor
    depth: Tensor
    visible: Tensor | None
    lengths: Sequence[int]
    positions: Sequence[Positions] | None = None
    edge_index: Tensor | None = None
    fovs: Sequence[str] = ()

    def full_depth(self, share: Tensor) -> Tensor:
        """Depth over all genes (tokens,), where the genes have these shares (tokens, genes) in a cell's transcripts."""
        return self.depth if self.visible is None else full_depth(share, self.counts, self.visible)


@dataclass
class Output:
    """Output for a batch: decoded distribution, latent (tokens, n_latent), and KL divergence (tokens,) or None."""

    decoded: Decoded
    latent: Tensor
    divergence: Tensor | None


def normalise(counts: Tensor, depth: Tensor, target_sum: float) -> Tensor:
    """Return ``log1p(counts / depth * target_sum)`` (cells, genes), 0 for cells of depth 0."""
    return torch.log1p(counts * (target_sum / depth.clamp(min=1e-6))[:, None])


class Network(nn.Module):
    """Masked autoencoder over the cells of a FOV (SpaFormer: Wen et al. 2023, sec. 3).

    A token is a linear embedding of the cell's expression (a sum of gene embeddings weighted by expression), plus
    embeddings of its neighbours' mean expression and of its depth, plus a positional encoding. The encoder lets tokens
    exchange information; a linear map gives the latent; the decoder gives the distribution of expression. A wide path
    leads from the token to the decoder's output directly (Cheng et al. 2016, "Wide & Deep Learning", DLRS): what is
    linear need not pass through the latent. In a perceptron, both sides of the latent are rectified instead, and it is
    as wide as a token: ``genes = W ReLU(LN(latent))``, ``latent = V ReLU(LN(token))``.

    Parameters
    ----------
    config
        Sizes and choices.
    gene_share
        Mean share of each gene (genes,), the start of the decoder's bias.
    positional
        Module ``(tokens, positions, edge_index, generator) -> tokens``, tokens (N, dim), or None.
    seeds
        Seed of the initial weights of each part, by name, so that switching one part on or off leaves the others'
        weights as they were.
    """

    def __init__(
        self, config: NetworkConfig, *, gene_share: Tensor, positional: nn.Module | None, seeds: dict[str, int]
    ) -> None:
        super().__init__()
        self.config = config
        with seeded(seeds["embedding"]):
            self.embedding = nn.Linear(config.n_genes, config.dim)
            self.depth = nn.Linear(1, config.dim)
            self.hidden_token = nn.Parameter(torch.zeros(config.dim))
        # One number with random weights would drown what the genes say until training has turned it down again.
        nn.init.zeros_(self.depth.weight)
        nn.init.zeros_(self.depth.bias)
        with seeded(seeds["neighbours"]):
            self.neighbours = nn.ModuleList(
                nn.Linear(config.n_genes, config.dim, bias=False) for _ in range(config.hops)
            )
        with seeded(seeds["encoder"]):
            self.encoder = Encoder(
                config.dim,
                config.n_layers,
                config.n_heads,
                kind=config.encoder,
                feedforward=config.feedforward,
                dropout=config.dropout,
            )
        with seeded(seeds["decoder"]):
            self.latent = nn.Linear(config.dim, config.n_latent)
            self.decoder: Decoder = DECODERS[config.decoder](
                config.n_latent,
                config.n_latent if config.perceptron else config.dim,
                config.n_genes,
                gene_share=gene_share,
                posterior=config.posterior,
                target_sum=config.target_sum,
                dispersion=config.dispersion,
                n_fovs=len(config.fovs),
                hidden=not config.perceptron,
            )
        with seeded(seeds["variational"]):
            self.latent_log_variance = nn.Linear(config.dim, config.n_latent) if config.variational else None
        with seeded(seeds["decoder"]):
            self.wide = nn.Linear(config.dim, config.n_genes, bias=False) if config.wide else None
        if self.wide is not None:
            nn.init.zeros_(self.wide.weight)
        self.latent_norm = nn.LayerNorm(config.n_latent) if config.perceptron else None
        self.positional = positional
        self._fov_numbers = {name: number for number, name in enumerate(config.fovs)}

    def _fovs(self, tokens: Tokens) -> Tensor | None:
        """Number of the FOV of each token (tokens,), -1 where the fit did not know it; None when nothing reads it."""
        if self.config.dispersion != "gene_fov":
            return None
        if len(tokens.fovs) != len(tokens.lengths):
            raise ValueError("this network has a dispersion per gene and FOV; `tokens.fovs` must name every FOV")
        numbers = torch.tensor([self._fov_numbers.get(name, -1) for name in tokens.fovs])
        return numbers.repeat_interleave(torch.tensor(tokens.lengths)).to(tokens.counts.device)

    def forward(self, tokens: Tokens, generator: torch.Generator | None = None) -> Output:
        """Run the network on a batch of FOVs; ``generator`` drives what is random in training."""
        x = self.embed(tokens)
        x, context = self.exchange(x, tokens.lengths, tokens.positions, tokens.edge_index, generator)
        return self.decode(x, context, tokens, generator)

    def embed(self, tokens: Tokens) -> Tensor:
        """Embed expression and depth of each token (tokens, dim), without its place; reads no other token."""
        x: Tensor = self.embedding(tokens.values[0])
        for embed, values in zip(self.neighbours, tokens.values[1:], strict=True):
            x = x + embed(values)
        x = x + self.depth(torch.log((tokens.depth + 1) / (self.config.target_sum + 1))[:, None])
        if tokens.visible is not None:
            x = torch.where(tokens.visible.any(1, keepdim=True), x, x + self.hidden_token)
        return x

    def exchange(
        self,
        x: Tensor,
        lengths: Sequence[int],
        positions: Sequence[Positions] | None,
        edge_index: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add their places to embedded tokens, and let those of a FOV exchange information.

        Parameters
        ----------
        x
            From :meth:`embed`, of all tokens of the batch (tokens, dim).
        lengths, positions, edge_index
            As in :class:`Tokens`.
        generator
            Source of what is random in training.

        Returns
        -------
        Tokens with their places, and what the encoder makes of them (tokens, dim each).
        """
        if self.positional is not None:
            if positions is None:
                raise ValueError("this network has a positional encoding; `tokens.positions` is needed")
            x = self.positional(x, positions, edge_index, generator)
        return x, self.encoder(x, lengths, edge_index)

    def decode(self, x: Tensor, context: Tensor, tokens: Tokens, generator: torch.Generator | None = None) -> Output:
        """Give latent and distribution of expression of each token; reads no other token.

        Parameters
        ----------
        x, context
            From :meth:`exchange` (tokens, dim each).
        tokens
            The same tokens, of which counts, depth, what is visible and FOVs are read.
        generator
            Source of what is random in training.
        """
        offset = None if self.wide is None else self.wide(x)
        if self.config.perceptron:
            context = self._rectified(context, generator)
        latent, divergence = at_least_float32(self.latent(context)), None
        decode_from = latent
        if self.latent_log_variance is not None:
            log_variance = at_least_float32(self.latent_log_variance(context)).clamp(-10.0, 10.0)
            divergence = 0.5 * (latent.square() + log_variance.exp() - 1.0 - log_variance).sum(-1)
            if self.training:
                noise = torch.randn(latent.shape, generator=generator, dtype=latent.dtype).to(latent.device)
                decode_from = latent + noise * (0.5 * log_variance).exp()
        if self.latent_norm is not None:
            decode_from = self._rectified(self.latent_norm(decode_from), generator)
        decoded = self.decoder(decode_from, tokens.counts, tokens.depth, tokens.visible, self._fovs(tokens), offset)
        return Output(decoded, latent, divergence)

    def _rectified(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """ReLU, and dropout in training; from a generator, as other threads may draw from the global one."""
        x = torch.relu(x)
        if not self.training:
            return x
        kept = torch.empty(x.shape).bernoulli_(1 - DROPOUT, generator=generator)
        return x * kept.to(x) / (1 - DROPOUT)
