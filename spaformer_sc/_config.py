"""What presets, qualities and "auto" stand for: every choice of a fit in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ._checks import _did_you_mean, check_choice, check_flag, check_integer, check_number

PRESETS = ("default", "paper")
QUALITIES = ("fast", "default", "best")
OUTPUTS = ("lognorm", "counts", "rate")
TARGET_SUMS = 1e-6, 1e12
"""Least and largest depth that expression is normalised to; single precision holds what comes of it."""
ZEROS = ("impute", "keep")
GRAPHS = ("knn", "delaunay", "radius")
ENCODERS = ("performer", "performer_relu", "exact", "gat", "mlp")
DECODERS = ("gaussian", "poisson", "nb", "zinb")
DISPERSIONS = ("gene", "gene_fov", "entry")
DISPERSED = ("nb", "zinb")
"""Decoders that have a dispersion."""
PRECISIONS = ("float32", "bf16")
READ_THE_GRAPH = frozenset({"gat", "conditional", "conditional_gat"})
"""Encoders and positional encodings that read the spatial graph between tokens."""
FORMS = ("plain", "wide", "large", "perceptron")
"""Forms of a network; see :func:`in_form`."""
PASSES = 60
"""Passes over all cells that a perceptron makes, within once and twice its usual steps."""
COMBINATIONS = ("add", "concat")
MASKINGS = ("bilevel", "tokens", "features", "genes", "thinning", "none")
POSITIONAL = (
    "laplacian",
    "signnet",
    "random_walk",
    "patch",
    "linear",
    "mlp",
    "sinusoidal",
    "fourier",
    "conditional",
    "conditional_gat",
)


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
        Share of the cells, and of the genes on them, that masking hides; a pair is where it starts and where it ends,
        and it changes linearly over the epochs.
    thinning
        Range of the probability that a transcript stays visible under thinning; drawn anew for each FOV and epoch.
    windows
        Divide a FOV into windows of neighbouring cells, in place of random subsets, for the sequences of a step;
        always true with what reads the graph between tokens (:data:`READ_THE_GRAPH`).
    precision
        Of the matrix products in training, one of :data:`PRECISIONS`; weights, likelihood and prediction are always
        ``"float32"``.
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
    masked_tokens: float | tuple[float, float] = 0.5
    masked_features: float | tuple[float, float] = 0.5
    thinning: tuple[float, float] = (0.3, 0.7)
    windows: bool = False
    precision: str = "float32"


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
    forms
        Forms of the first networks, in :data:`FORMS`; those after them have the same in turn, the one first that did
        best on what is held out.
    pca_start
        The embeddings of the cell's and its neighbours' expression start at principal components.
    hops
        Rings of spatial neighbours whose mean expression is an input.
    posterior
        Gamma-Poisson update with the cell's own counts; off unless ``masking`` has ``"thinning"``, which teaches it.
    typical_fill
        In the input, hidden entries have the mean value of their gene; else they are 0.
    dispersion
        What the dispersion of ``nb`` and ``zinb`` depends on: ``"gene"``; ``"gene_fov"``, by the FOV's name, where a
        FOV that the fit did not know has that of the gene; or ``"entry"``, decoded from the latent.
    positional_combine
        ``"add"`` positional encodings to the token, or ``"concat"``: concatenate all and map them to a token.
    patch_size
        Side of a bin of ``patch``, in the unit of the coordinates; None for 10 typical distances between neighbours.
    n_frequencies
        Frequencies of ``fourier``.
    n_eigenvectors
        Eigenvectors of ``laplacian`` and ``signnet``, steps of ``random_walk``, wavelengths of ``sinusoidal``.
    n_networks
        Networks trained from different seeds and averaged.
    mixing
        Weights of the networks, of the cell's own counts and of the gene means in the prediction are fitted to the
        counts and entries that are held out; else networks have equal weights, and nothing is mixed in.
    n_pooled
        Cells alike, and as many cells near, whose counts are evidence on what the networks say of a cell; 0 for none.
    model_sum
        Depth that expression is normalised to at the input; None for the median of the cells.
    training
        The training loop.
    """

    encoder: str = "performer"
    decoder: str = "nb"
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
    forms: tuple[str, ...] = FORMS
    pca_start: bool = True
    posterior: bool = True
    typical_fill: bool = True
    dispersion: str = "gene"
    positional_combine: str = "add"
    patch_size: float | None = None
    n_frequencies: int = 64
    n_eigenvectors: int = 10
    n_networks: int = 5
    mixing: bool = True
    n_pooled: int = 60
    model_sum: float | None = None
    training: Training = field(default_factory=Training)

    @property
    def graph_readers(self) -> frozenset[str]:
        """Chosen parts that read the spatial graph between tokens."""
        return READ_THE_GRAPH.intersection((self.encoder, *self.positional))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of numbers, strings, booleans, lists and None."""
        plain = asdict(self)
        plain |= {name: list(plain[name]) for name in ("positional", "masking", "forms")}
        plain["training"] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in plain["training"].items()
        }
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If something lacks, is not known, or has a value that it cannot have.
        """
        values = dict(plain)
        training: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values["training"].items()
        }
        values["training"] = Training(**training)
        values |= {name: tuple(values[name]) for name in ("positional", "masking", "forms")}
        found = cls(**values)
        check_choice("encoder", found.encoder, ENCODERS)
        check_choice("decoder", found.decoder, DECODERS)
        _names("positional", found.positional, POSITIONAL)
        _names("masking", found.masking, MASKINGS)
        check_flag("variational", found.variational)
        check_flag("masking_is_auto", found.masking_is_auto)
        check_integer("n_latent", found.n_latent)
        _or_none(_whole())("max_epochs", found.training.max_epochs)
        model, loop = vars(found), vars(found.training)
        return with_advanced(found, {name: model[name] for name in _MODEL} | {name: loop[name] for name in _TRAINING})


PAPER = Settings(
    decoder="gaussian",
    forms=("plain",),
    pca_start=False,
    n_networks=1,
    mixing=False,
    n_pooled=0,
    positional=("signnet",),
    masking=("bilevel",),
    n_latent=20,
    feedforward=4,
    dropout=0.2,
    hops=0,
    posterior=False,
    typical_fill=False,
    model_sum=250.0,
    training=Training(tokens_per_step=None, learning_rate=1e-3, weight_decay=5e-4, schedule="constant", averaging=0.0),
)
"""The paper's configuration (Wen et al. 2023, sec. 4.1), as far as our parts express it."""


def _whole(minimum: int = 1) -> Callable[[str, Any], int]:
    return lambda name, value: check_integer(name, value, minimum=minimum)


def _number(low: float, high: float = math.inf) -> Callable[[str, Any], float]:
    return lambda name, value: check_number(name, value, low, high)


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        check_choice(name, value, allowed)
        return str(value)

    return check


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _hops(name: str, value: Any) -> int:
    hops = check_integer(name, value, minimum=0)
    check_choice(name, hops, (0, 1, 2))
    return hops


def _forms(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(f"`{name}={value!r}` must be a list of one or more of {', '.join(FORMS)}.")
    forms = _names(name, value, FORMS)
    if "perceptron" in forms[:-1] or forms == ("perceptron",):
        raise ValueError(
            f"`{name}={list(forms)}`: the embedding is that of a network of another form; name `perceptron` last."
        )
    return forms


def _pair(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise TypeError(f"`{name}={value!r}` must be a pair of numbers, such as [0.3, 0.7].")
    return check_number(name, value[0], 0.0, 1.0), check_number(name, value[1], 0.0, 1.0)


def _rate(name: str, value: Any) -> float | tuple[float, float]:
    pair = hasattr(value, "__len__") and not isinstance(value, str)
    return _pair(name, value) if pair else check_number(name, value, 0.0, 1.0)


_MODEL: dict[str, Callable[[str, Any], Any]] = {
    "dim": _whole(),
    "n_layers": _whole(0),
    "n_heads": _whole(),
    "feedforward": _whole(),
    "dropout": _number(0.0, 0.95),
    "hops": _hops,
    "forms": _forms,
    "pca_start": check_flag,
    "posterior": check_flag,
    "typical_fill": check_flag,
    "dispersion": _choice(*DISPERSIONS),
    "positional_combine": _choice(*COMBINATIONS),
    "patch_size": _or_none(_number(1e-6)),
    "n_eigenvectors": _whole(),
    "n_frequencies": _whole(),
    "n_networks": _whole(),
    "mixing": check_flag,
    "n_pooled": _whole(0),
    "model_sum": _or_none(_number(*TARGET_SUMS)),
}
_TRAINING: dict[str, Callable[[str, Any], Any]] = {
    "n_steps": _whole(),
    "tokens_per_step": _or_none(_whole()),
    "learning_rate": _number(1e-12),
    "weight_decay": _number(0.0),
    "schedule": _choice("cosine", "constant"),
    "warmup_steps": _whole(),
    "clip_norm": _number(1e-12),
    "averaging": _number(0.0, 0.99999),
    "patience": _whole(),
    "n_validations": _whole(),
    "redraw_every": _whole(),
    "masked_tokens": _rate,
    "masked_features": _rate,
    "thinning": _pair,
    "windows": check_flag,
    "precision": _choice(*PRECISIONS),
}
ADVANCED = (*_MODEL, *_TRAINING)
"""Names that ``settings=`` takes."""
ARGUMENTS = (
    "preset",
    "quality",
    "encoder",
    "decoder",
    "positional",
    "variational",
    "masking",
    "n_latent",
    "max_epochs",
    "graph",
    "n_neighbors",
    "output",
    "random_state",
)
"""Choices that have an argument of their own."""


def with_advanced(settings: Settings, given: Mapping[str, Any] | None) -> Settings:
    """Replace choices that have no argument of their own.

    Raises
    ------
    TypeError, ValueError
        For a name that is not in :data:`ADVANCED`, or a value that it cannot have.
    """
    if given is None:
        return settings
    if not isinstance(given, Mapping):
        raise TypeError(f"`settings` must be a dictionary of names and values, not {type(given).__name__}.")
    for name in given:
        if name in ARGUMENTS:
            raise ValueError(f"`settings[{name!r}]`: give `{name}=` as an argument of its own.")
        if name not in ADVANCED:
            hint = _did_you_mean(str(name), ADVANCED)
            raise ValueError(f"`settings` has no {name!r}.{hint} It has: {', '.join(ADVANCED)}.")
    model = {name: check(f"settings[{name!r}]", given[name]) for name, check in _MODEL.items() if name in given}
    training = {name: check(f"settings[{name!r}]", given[name]) for name, check in _TRAINING.items() if name in given}
    changed = replace(settings, **model, training=replace(settings.training, **training))
    if changed.dim % changed.n_heads:
        raise ValueError(
            f"`settings`: dim={changed.dim} must be a multiple of n_heads={changed.n_heads}; change one of them."
        )
    low, high = changed.training.thinning
    if not 0 < low <= high < 1:
        raise ValueError(
            f"`settings['thinning']={[low, high]}` must be two shares between 0 and 1, the first not above the second."
        )
    return changed


def _names(argument: str, value: str | Sequence[str] | None, allowed: Sequence[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        raise TypeError(f"`{argument}={value!r}` must be a name, a list of names or None; names: {', '.join(allowed)}.")
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
    settings: Mapping[str, Any] | None = None,
) -> Settings:
    """Decide every "auto" from the preset and the quality; what is given explicitly wins.

    Raises
    ------
    TypeError
        For what is neither a name nor a list of names.
    ValueError
        For a name that is not among the choices, where the message lists them, or for choices that do not go together.
    """
    check_choice("preset", preset, PRESETS)
    check_choice("quality", quality, QUALITIES)
    chosen = PAPER if preset == "paper" else Settings()
    if quality == "fast":
        chosen = replace(chosen, n_networks=1, forms=chosen.forms if preset == "paper" else ("wide",))
    elif quality == "best":
        chosen = replace(chosen, n_networks=10)
    if positional != "auto":
        chosen = replace(chosen, positional=_names("positional", positional, POSITIONAL))
    if encoder != "auto":
        check_choice("encoder", encoder, ENCODERS)
        chosen = replace(chosen, encoder=encoder)
    if decoder != "auto":
        check_choice("decoder", decoder, DECODERS)
        chosen = replace(chosen, decoder=decoder)
    if chosen.decoder == "gaussian":
        # Log-normalised values depend on depth, so their target must not be thinned; and they are no shares to mix.
        chosen = replace(chosen, masking=("bilevel",), mixing=False, n_pooled=0)
    if masking != "auto":
        chosen = replace(chosen, masking=_names("masking", masking, MASKINGS) or ("none",))
    if "thinning" not in chosen.masking or chosen.decoder == "gaussian":
        # Only thinning asks for entries that are visible too, and so teaches how much to trust a cell's own count.
        chosen = replace(chosen, posterior=False)
    if n_latent is not None:
        chosen = replace(chosen, n_latent=n_latent)
    if max_epochs is not None:
        chosen = replace(chosen, training=replace(chosen.training, max_epochs=max_epochs))
    chosen = replace(chosen, variational=bool(variational), masking_is_auto=masking == "auto")
    chosen = with_advanced(chosen, settings)
    _check_together(chosen, {} if settings is None else settings)
    if chosen.graph_readers:
        chosen = replace(chosen, training=replace(chosen.training, windows=True))
    return chosen


def _check_together(chosen: Settings, given: Mapping[str, Any]) -> None:
    """Refuse choices that contradict each other, or hide nothing."""
    if chosen.dispersion != "gene" and chosen.decoder not in DISPERSED:
        raise ValueError(
            f"`settings['dispersion']={chosen.dispersion!r}` needs a decoder with a dispersion, not "
            f"decoder={chosen.decoder!r}; choose one of {', '.join(DISPERSED)}, or leave `dispersion` at 'gene'."
        )
    if chosen.decoder == "gaussian" and chosen.posterior:
        raise ValueError(
            "`settings['posterior']=True` needs a decoder of counts, not decoder='gaussian'; leave it out."
        )
    if chosen.decoder == "gaussian" and chosen.mixing:
        raise ValueError("`settings['mixing']=True` needs a decoder of counts, not decoder='gaussian'; leave it out.")
    if chosen.decoder == "gaussian" and chosen.n_pooled:
        raise ValueError("`settings['n_pooled']` needs a decoder of counts, not decoder='gaussian'; leave it out.")
    if chosen.training.max_epochs is not None and "n_steps" in given:
        raise ValueError("`max_epochs` and `settings['n_steps']` both say how long to train; give one of them.")
    if chosen.graph_readers and given.get("windows") is False:
        raise ValueError(
            f"`settings['windows']=False`: {', '.join(sorted(chosen.graph_readers))} reads the graph between "
            "neighbouring cells, which random subsets do not keep; leave `windows` out."
        )
    hiding = {"masked_tokens": ("bilevel", "tokens"), "masked_features": ("bilevel", "features", "genes")}
    for name, maskings in hiding.items():
        rate = getattr(chosen.training, name)
        if rate in (0, (0, 0)) and not set(maskings).isdisjoint(chosen.masking):
            raise ValueError(
                f"`settings[{name!r}]={rate}` hides nothing, so that nothing could be learnt; take a share above 0, or "
                "another `masking`."
            )


def in_form(settings: Settings, form: str, n_cells: int = 0) -> Settings:
    """Settings of one network.

    ``plain`` is what the settings say. ``wide`` has a linear path from the token to the genes beside the encoder, and
    half the learning rate. ``large`` is wide, with tokens of twice the size, and takes four steps, of a quarter of
    ``tokens_per_step`` cells each, for every step of the others, and twice as many validations. ``perceptron`` has one
    hidden layer and dropout in place of encoder and latent, is neither variational nor has it a posterior, and has
    tokens of four times the size; it is trained as ``large``, with up to twice as many steps where cells are so many
    that these are fewer than :data:`PASSES` passes.

    Parameters
    ----------
    settings
        Settings of the model.
    form
        One of :data:`FORMS`.
    n_cells
        Cells that the network is trained on.
    """
    if form == "plain":
        return settings
    training = settings.training
    training = replace(training, learning_rate=training.learning_rate / 2)
    if form == "wide":
        return replace(settings, training=training)
    tokens = training.tokens_per_step
    training = replace(
        training,
        n_steps=4 * training.n_steps,
        n_validations=2 * training.n_validations,
        tokens_per_step=None if tokens is None else max(1, tokens // 4),
        averaging=1 - (1 - training.averaging) / 5 if training.averaging else 0.0,
    )
    if form == "large":
        return replace(settings, dim=2 * settings.dim, training=training)
    if training.tokens_per_step is not None:
        passes = math.ceil(PASSES * n_cells / training.tokens_per_step)
        training = replace(training, n_steps=min(max(training.n_steps, passes), 2 * training.n_steps))
    dim = 4 * settings.dim
    return replace(
        settings,
        dim=dim,
        n_latent=dim,
        n_layers=0,
        dropout=0.0,
        variational=False,
        posterior=False,
        training=training,
    )


def n_computed(s: Settings) -> int:
    """Numbers that an encoder computes of a cell at a time, about."""
    if not s.n_layers:
        return 3 * s.dim
    of_heads = 7 + 2 * math.ceil(math.log(s.dim)) // s.n_heads
    return s.dim * (37 if s.graph_readers else max(14, 3 + 2 * s.feedforward, of_heads))


def n_weights(settings: Settings, form: str, n_genes: int) -> int:
    """Number of weights of one network, about."""
    s = in_form(settings, form)
    wide, zeros, entry = form in ("wide", "large"), s.decoder == "zinb", s.dispersion == "entry"
    by_gene = 2 + s.hops + s.posterior + wide + zeros + entry
    return s.dim * (n_genes * by_gene + s.dim * max(1, (4 + 2 * s.feedforward) * s.n_layers))


def with_missing(settings: Settings, hidden_as: str | None) -> Settings:
    """Add to an automatic choice the masking that hides entries like those that were not measured.

    Thinning never hides a gene whole, so only masking teaches the network to tell "not measured" from "no counts".

    Parameters
    ----------
    settings
        The choices.
    hidden_as
        ``"features"`` for single entries, ``"genes"`` for genes in whole FOVs; None where all were measured.
    """
    if hidden_as is None or not settings.masking_is_auto:
        return settings
    return replace(settings, masking=tuple(dict.fromkeys((*settings.masking, hidden_as))))
