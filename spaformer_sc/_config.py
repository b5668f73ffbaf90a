"""What presets, qualities and "auto" stand for: every choice of a fit in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ._checks import check_choice

PRESETS = ("default", "paper")
QUALITIES = ("fast", "default", "best")
OUTPUTS = ("lognorm", "counts", "rate")
GRAPHS = ("knn", "delaunay", "radius")
ENCODERS = ("performer", "exact", "mlp")
DECODERS = ("gaussian", "poisson", "nb", "zinb")
MASKINGS = ("bilevel", "tokens", "features", "thinning", "none")
POSITIONAL = ("laplacian", "signnet", "random_walk", "patch", "linear", "mlp", "sinusoidal", "fourier")


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes
    ----------
    n_steps
        Optimiser steps when ``max_epochs`` is None; does not depend on how the tissue was cut into FOVs.
    max_epochs
        Passes over all cells; None for as many as make ``n_steps``.
    tokens_per_step
        Cells in a step; None for one whole FOV a step.
    learning_rate, weight_decay
        Of AdamW (Loshchilov and Hutter 2019); no decay on biases, norms and per-gene parameters.
    schedule
        ``"cosine"`` (down to 0 at the last step) or ``"constant"``, both after a linear warm-up.
    warmup_steps
        Steps over which the learning rate grows; at most a tenth of all steps.
    clip_norm
        Largest norm of the gradient.
    averaging
        Decay of the exponential moving average of the weights; 0 for none. The average is what is validated and kept.
    patience
        Validations without improvement after which training stops.
    n_validations
        Validations over a full training.
    redraw_every
        Steps between draws of new random features of the attention.
    masked_tokens, masked_features
        Share of the cells, and of the genes on them, that masking hides.
    thinning
        Range of the probability that a transcript stays visible under thinning; drawn anew for each FOV and epoch.
    """

    n_steps: int = 2000
    max_epochs: int | None = None
    tokens_per_step: int | None = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup_steps: int = 100
    clip_norm: float = 1.0
    averaging: float = 0.99
    patience: int = 6
    n_validations: int = 25
    redraw_every: int = 100
    masked_tokens: float = 0.5
    masked_features: float = 0.5
    thinning: tuple[float, float] = (0.3, 0.7)


@dataclass(frozen=True)
class Settings:
    """A complete set of choices: what is left when every "auto" has been decided.

    Attributes
    ----------
    encoder, decoder, positional, variational, masking, n_latent
        As the arguments of :func:`spaformer_sc.tl.impute`.
    masking_is_auto
        Whether ``masking`` was left to us.
    dim, n_layers, n_heads, feedforward, dropout
        Width of a token, encoder layers, heads, width of the feed-forward block in ``dim``, dropout.
    hops
        Rings of spatial neighbours whose mean expression is an input.
    posterior
        Gamma-Poisson update with the cell's own counts.
    n_eigenvectors
        Laplacian eigenvectors of the encodings that use them.
    n_networks
        Networks trained from different seeds and averaged.
    model_sum
        Depth that expression is normalised to at the input; None for the median of the cells.
    training
        The training loop.
    """

    encoder: str = "performer"
    decoder: str = "poisson"
    positional: tuple[str, ...] = ()
    variational: bool = False
    masking: tuple[str, ...] = ("thinning",)
    masking_is_auto: bool = True
    n_latent: int = 64
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 8
    feedforward: int = 2
    dropout: float = 0.0
    hops: int = 2
    posterior: bool = True
    n_eigenvectors: int = 10
    n_networks: int = 1
    model_sum: float | None = None
    training: Training = field(default_factory=Training)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of numbers, strings, booleans, lists and None."""
        plain = asdict(self)
        plain["positional"], plain["masking"] = list(self.positional), list(self.masking)
        plain["training"]["thinning"] = list(self.training.thinning)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`."""
        values = dict(plain)
        training = dict(values["training"])
        values["training"] = Training(**{**training, "thinning": tuple(training["thinning"])})
        values["positional"], values["masking"] = tuple(values["positional"]), tuple(values["masking"])
        return cls(**values)


PAPER = Settings(
    decoder="gaussian",
    positional=("signnet",),
    masking=("bilevel",),
    n_latent=20,
    feedforward=4,
    dropout=0.2,
    hops=0,
    posterior=False,
    model_sum=250.0,
    training=Training(tokens_per_step=None, learning_rate=1e-3, weight_decay=5e-4, schedule="constant", averaging=0.0),
)
"""The paper's configuration (Wen et al. 2023, sec. 4.1), as far as our parts express it."""


def _names(argument: str, value: str | Sequence[str] | None, allowed: Sequence[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        check_choice(argument, name, allowed)
    if len(set(names)) < len(names):
        raise ValueError(f"`{argument}={list(names)}` names an entry twice; give each once.")
    return names


def resolve(
    *,
    preset: str,
    quality: str,
    positional: str | Sequence[str] | None,
    encoder: str,
    decoder: str,
    variational: bool,
    masking: str | Sequence[str] | None,
    n_latent: int | None,
    max_epochs: int | None,
) -> Settings:
    """Decide every "auto" from the preset and the quality; what is given explicitly wins.

    Raises
    ------
    ValueError
        For a name that is not among the choices; the message lists them.
    """
    check_choice("preset", preset, PRESETS)
    check_choice("quality", quality, QUALITIES)
    settings = PAPER if preset == "paper" else Settings()
    if quality == "fast":
        settings = replace(settings, training=replace(settings.training, n_steps=settings.training.n_steps // 3))
    elif quality == "best":
        settings = replace(settings, n_networks=4)
    if positional != "auto":
        settings = replace(settings, positional=_names("positional", positional, POSITIONAL))
    if encoder != "auto":
        check_choice("encoder", encoder, ENCODERS)
        settings = replace(settings, encoder=encoder)
    if decoder != "auto":
        check_choice("decoder", decoder, DECODERS)
        settings = replace(settings, decoder=decoder)
    if settings.decoder == "gaussian":
        # Log-normalised values depend on depth, so their target must not be thinned.
        settings = replace(settings, posterior=False, masking=("bilevel",))
    if masking != "auto":
        settings = replace(settings, masking=_names("masking", masking, MASKINGS) or ("none",))
    if n_latent is not None:
        settings = replace(settings, n_latent=n_latent)
    if max_epochs is not None:
        settings = replace(settings, training=replace(settings.training, max_epochs=max_epochs))
    return replace(settings, variational=bool(variational), masking_is_auto=masking == "auto")


def with_missing(settings: Settings, missing: bool) -> Settings:
    """Add feature masking to an automatic choice where entries were not measured.

    Thinning never hides a gene whole, so only masking teaches the network to tell "not measured" from "no counts".
    """
    if not missing or not settings.masking_is_auto or "features" in settings.masking:
        return settings
    return replace(settings, masking=(*settings.masking, "features"))
