"""The model object: fit, impute, embed, save, load."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from . import __version__, _checks
from ._config import (
    ADVANCED,
    FORMS,
    GRAPHS,
    OUTPUTS,
    PAPER,
    TARGET_SUMS,
    Settings,
    Training,
    in_form,
    n_computed,
    n_weights,
    resolve,
    with_missing,
)
from ._data_objects import takes_tables
from ._gather import Block, Gathered, InMemory
from ._logging import logger
from ._memory import give_back, state_memory
from ._saved import UNREADABLE, read_model, write_model
from ._settings import settings as defaults
from ._threads import Workers, wait_patiently
from .training.ranks import ALONE, Ranks, join, launch, launched

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from spatialdata import SpatialData

    from .data._counts import Counts
    from .data._fields import FieldOfView, Layout
    from .data._split import HeldOut
    from .nn.network import Network, NetworkConfig, Output, Tokens
    from .positional import CombinedEncodings
    from .training.checkpoint import Checkpoint
    from .training.mixing import Correction, HeldCounts, HeldEntries
    from .training.posterior import Posterior
    from .training.prediction import Said
    from .training.sequences import FieldCounts, Sampler, Whole
    from .training.trainer import History

GatheredT = TypeVar("GatheredT", bound=Gathered)

VALIDATION_SHARE = 0.05
"""Share of the transcripts that decides when training stops (where entries are missing, held-out entries do) and what
is mixed into the prediction."""

TEST_SHARE = 0.05
"""Share of the transcripts that the scores are measured on; neither training nor stopping sees them."""

VALIDATED_CELLS = 12_000
"""Cells whose held-out transcripts decide when training stops; more decide no better, and take as long again."""

FITTED_ENTRIES, LEAST_FITTED = 100_000_000, 10_000
"""Entries, cells times genes, of a fit, about, and least number of cells: larger data lend some FOVs to it."""

HELD_ENTRIES = 0.05
"""Share of the measured entries that is hidden, where others are missing, to decide when training stops."""

LED_BACK, LEAST_LED_BACK = 1000, 10
"""About as many cells, but so many of each FOV, tell how log-normalised values lead back to expected counts."""

LEAST_VALIDATIONS = 10
"""Validations of a network that is tuned, however few its steps; each takes as long as some steps."""

GRAPH_DEFAULTS = {"graph": "knn", "n_neighbors": 6, "radius": None, "tile_size": 4000, "random_state": 0}
"""What these arguments are unless they are given."""

AS_FITTED = "as fitted"
"""Default of arguments that say where data are found: as in the fit."""


def derived_seed(random_state: int, part: str) -> int:
    """Seed of one stochastic part, so that no part's random numbers depend on whether another part is in use."""
    return int(np.random.SeedSequence([random_state, zlib.crc32(part.encode())]).generate_state(1)[0] >> 1)


@dataclass(frozen=True)
class DataKeys:
    """Where things are found in an AnnData; see :func:`spaformer_sc.tl.impute`."""

    library_key: str | list[str] | None
    spatial_key: str
    connectivity_key: str | None
    layer: str | None
    missing: str | None


@dataclass(frozen=True)
class Opened:
    """A checked AnnData: counts (cells, genes of the model), entries not measured, and how it is cut into FOVs."""

    counts: Counts
    missing: NDArray[np.bool_] | None
    layout: Layout

    def digest(self, genes: Iterable[object]) -> str:
        """Checksum that tells these data from others."""
        found = hashlib.sha256("\n".join([self.counts.checksum(), *map(str, genes)]).encode())
        parts: list[NDArray[Any]] = [self.layout.coordinates, self.layout.codes]
        if self.missing is not None:
            parts.append(np.packbits(self.missing))
        if (graph := self.layout.given) is not None:
            parts += [graph.indptr, graph.indices, graph.data]
        for part in parts:
            found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()

    def read(self, field: FieldOfView) -> FieldCounts:
        """Read the counts of one FOV."""
        from .training.sequences import FieldCounts

        missing = None if self.missing is None else self.missing[field.cells]
        counts = self.counts.rows(field.cells)
        return FieldCounts(field, counts if missing is None else _without(counts, missing), missing)


@dataclass(frozen=True)
class Loaded:
    """Cells in memory: counts (cells, genes of the model), FOVs, entries not measured, FOV of a cell.

    ``cells`` are their rows in the AnnData, None for all of it.
    """

    counts: sp.csr_matrix
    fields: list[FieldOfView]
    missing: NDArray[np.bool_] | None
    images: NDArray[np.int64]
    graph_summary: dict[str, Any]
    cells: NDArray[np.int64] | None = None

    @property
    def hidden_as(self) -> str | None:
        """The corruption that hides entries like the missing ones; None where nothing is missing."""
        from .data._split import in_blocks

        if self.missing is None:
            return None
        return "genes" if in_blocks(self.missing, self.images) else "features"


@dataclass(frozen=True)
class Start:
    """Fitted networks that a training goes on from, with a share of the steps of a fit."""

    model: SpaFormer
    effort: float

    def training(self, usual: Training) -> Training:
        """How to train a network further that is usually trained like this: at the usual rate, validated less often."""
        n_steps = max(1, round(self.effort * usual.n_steps))
        n_epochs = None if usual.max_epochs is None else max(1, round(self.effort * usual.max_epochs))
        n_validations = min(usual.n_validations, max(LEAST_VALIDATIONS, round(self.effort * usual.n_validations)))
        return replace(usual, n_steps=n_steps, max_epochs=n_epochs, n_validations=n_validations)

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """Weights of a network; nothing is mixed into its shares yet, and gene means are those of the new data."""
        return {
            name: weight
            for name, weight in self.model._networks[number].state_dict().items()
            if name not in ("decoder.mixture", "decoder.gene_share")
        }


class SpaFormer:
    """Masked autoencoder over the cells of fields of view, fitted to one or more spatial data sets.

    What :func:`spaformer_sc.tl.impute` wraps. It reads AnnData objects and never writes into them.

    Parameters
    ----------
    library_key, spatial_key, connectivity_key, layer, missing
        Where the data are; as in :func:`spaformer_sc.tl.impute`. The methods take them too, for data that name them
        differently.
    preset, quality, positional, encoder, decoder, variational, masking, n_latent, max_epochs, settings
        The model; as in :func:`spaformer_sc.tl.impute`.
    graph, n_neighbors, radius, tile_size
        Spatial graphs and tiles; as in :func:`spaformer_sc.tl.impute`.
    device, devices, random_state, progress
        As in :func:`spaformer_sc.tl.impute`.

    Attributes
    ----------
    settings
        Every choice, "auto" decided.
    var_names
        Genes of the fit, in order; None before it.
    n_cells
        Number of cells of the fit; None before it.
    scores
        Scores on held-out counts over all genes; see :func:`spaformer_sc.tl.impute`.
    fractional
        Whether counts of the fit had fractions.
    gene_scores
        The same for each gene, a data frame (genes × scores).
    cell_scores
        Scores on held-out counts of about 50 cells (more in over 25,000) like each (cells of the fit × scores);
        empty in a loaded model.
    fov_scores
        Scores of each field of view (FOVs × scores); empty in a loaded model.
    posterior
        What is known of entries beyond their mean; see :func:`spaformer_sc.tl.interval`.
    history
        One entry per validation: ``step``, ``epoch``, ``loss``, ``validation``, ``network``.

    Examples
    --------
    >>> model = sf.SpaFormer(library_key="fov").fit(adata)
    >>> expression = model.impute(other_slide, output="lognorm")
    >>> model.save("lung_model")
    """

    @_checks.explains_unknown_arguments(ADVANCED)
    def __init__(
        self,
        *,
        library_key: str | Sequence[str] | None = None,
        spatial_key: str = "spatial",
        connectivity_key: str | None = None,
        layer: str | None = None,
        missing: str | None = None,
        preset: str = "default",
        quality: str = "default",
        positional: str | Sequence[str] | None = "auto",
        encoder: str = "auto",
        decoder: str = "auto",
        variational: bool = False,
        masking: str | Sequence[str] | None = "auto",
        n_latent: int | None = None,
        max_epochs: int | None = None,
        settings: Mapping[str, Any] | None = None,
        graph: Literal["knn", "delaunay", "radius"] = "knn",
        n_neighbors: int = 6,
        radius: float | None = None,
        tile_size: int = 4000,
        device: str = "auto",
        devices: int = 1,
        random_state: int = 0,
        progress: bool | None = None,
    ) -> None:
        _checks.check_choice("graph", graph, GRAPHS)
        if graph == "radius" and radius is None:
            raise ValueError("`graph='radius'` needs `radius=`, in the unit of the coordinates.")
        if graph != "radius" and radius is not None:
            raise ValueError(f"`radius={radius!r}` is used with `graph='radius'` only, not with `graph={graph!r}`.")
        self.graph = graph
        self.radius = None if radius is None else _checks.check_positive("radius", radius)
        self.n_neighbors = _checks.check_integer("n_neighbors", n_neighbors)
        self.tile_size = _checks.check_integer("tile_size", tile_size, minimum=50)
        self.random_state = _checks.check_integer("random_state", random_state, minimum=0)
        self.progress = _checks.check_flag("progress", defaults.progress if progress is None else progress)
        # What "auto" is now: settings may change while the model is in use.
        self.device = defaults.device if isinstance(device, str) and device == "auto" else device
        self.devices = _checks.check_devices(devices)
        self._ranks = ALONE
        self._chosen: Settings = resolve(
            preset=preset,
            quality=quality,
            positional=positional,
            encoder=encoder,
            decoder=decoder,
            variational=_checks.check_flag("variational", variational),
            masking=masking,
            n_latent=None if n_latent is None else _checks.check_integer("n_latent", n_latent),
            max_epochs=None if max_epochs is None else _checks.check_integer("max_epochs", max_epochs),
            settings=settings,
        )
        self.settings = self._chosen
        self.keys = DataKeys(_as_key(library_key), spatial_key, connectivity_key, layer, missing)
        self.var_names: pd.Index | None = None
        self.n_cells: int | None = None
        self.scores: dict[str, float] = {}
        self.gene_scores = pd.DataFrame()
        self.cell_scores = pd.DataFrame()
        self.fov_scores = pd.DataFrame()
        self.posterior: Posterior | None = None
        self.history: dict[str, list[float]] = {}
        self.graph_summary: dict[str, Any] = {}
        self.target_sum: float = float("nan")
        self._model_sum: float = float("nan")
        self._gene_share: NDArray[np.float32] | None = None
        self._typical: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self.fractional = False
        self._fovs: tuple[str, ...] = ()
        self._kinds = np.zeros((0, 0), dtype=np.float32)
        self._kind_of_cell = np.zeros(0, dtype=np.int64)
        self._networks: list[Network] = []
        self._forms: list[str] = []
        self._concentration = math.inf
        self._weights: NDArray[np.float64] = np.zeros((2, 0))

    def __repr__(self) -> str:
        lines = [f"choices: {self._choices()}"]
        if self.var_names is None:
            return "\n  ".join(["SpaFormer, not fitted", *lines])
        cells = "" if self.n_cells is None else f"{self.n_cells:,} cells × "
        n_fovs = self.graph_summary["n_fovs"]
        fovs = "1 field of view" if n_fovs == 1 else f"{n_fovs:,} fields of view"
        weights = [f"{form} {weight:.2f}" for form, weight in zip(self._forms, self._weights[0], strict=True)]
        lines += [f"networks: {len(weights)}, with their weights: {', '.join(weights)}"]
        if np.isfinite(self.scores["gain"]):
            lines.append(
                f"held-out gain: {self.scores['gain']:.3f} nats per transcript over gene means, "
                f"{self.scores['gain_over_baseline']:.3f} over gene means and own counts"
            )
        from .training.reliability import undecided

        verdicts = self.gene_scores["reliability"].value_counts(sort=False)
        genes = ", ".join(f"{n:,} {verdict}" for verdict, n in verdicts[::-1].items())
        few = int(undecided(self.gene_scores).sum())
        lines.append(f"genes: {genes}" + f" ({few:,} of these have too few transcripts to tell)" * (few > 0))
        return "\n  ".join([f"SpaFormer, fitted to {cells}{len(self.var_names):,} genes in {fovs}", *lines])

    def _choices(self) -> str:
        """Choices that differ from those of the preset that they are nearest to."""

        def flat(settings: Settings) -> dict[str, Any]:
            plain = settings.to_dict()
            training = plain.pop("training")
            del plain["masking_is_auto"]
            return {**plain, **training}

        now = flat(self.settings)
        others = {**vars(self.keys), **{name: getattr(self, name) for name in GRAPH_DEFAULTS}}
        usual = {**vars(DataKeys(None, "spatial", None, None, None)), **GRAPH_DEFAULTS}
        by_preset = {
            preset: [f"{name}={value!r}" for name, value in now.items() if value != flat(base)[name]]
            for preset, base in (("default", Settings()), ("paper", PAPER))
        }
        preset = min(by_preset, key=lambda name: len(by_preset[name]))
        changed = [f"{name}={value!r}" for name, value in others.items() if value != usual[name]]
        changed = [*([] if preset == "default" else [f"preset={preset!r}"]), *changed, *by_preset[preset]]
        return ", ".join(changed) or "the defaults"

    # --- fitting ------------------------------------------------------------------------------------------------------

    @takes_tables
    def fit(
        self,
        adata: AnnData | SpatialData,
        *,
        table_key: str | None = None,
        library_key: str | Sequence[str] | None = AS_FITTED,
        spatial_key: str = AS_FITTED,
        connectivity_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        missing: str | None = AS_FITTED,
    ) -> SpaFormer:
        """Fit the model to raw counts.

        A twentieth of all transcripts is held out to decide when to stop (in large data, that of some FOVs drawn at
        random), and another twentieth to score the result. Where entries are missing, a twentieth of the others is
        hidden too, and decides when to stop. Data of more than about 100 million entries (cells times genes) are fitted
        to some of their fields of view, drawn at random. An earlier fit of the same object is forgotten.

        Parameters
        ----------
        adata
            Counts (cells × genes) and coordinates; not changed.
        table_key
            Of a SpatialData, the table; may be left out where there is only one.
        library_key, spatial_key, connectivity_key, layer, missing
            Where the data are; by default as given to the constructor.

        Returns
        -------
        The model itself.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the data cannot be used, before any training; the message says what to do.
        """
        self._fit_data(adata, self._keys_for(library_key, spatial_key, connectivity_key, layer, missing))
        return self

    @takes_tables
    def fine_tune(
        self,
        adata: AnnData | SpatialData,
        *,
        effort: float = 0.2,
        table_key: str | None = None,
        library_key: str | Sequence[str] | None = AS_FITTED,
        spatial_key: str = AS_FITTED,
        connectivity_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        missing: str | None = AS_FITTED,
    ) -> SpaFormer:
        """Go on training with other cells, such as those of a new slide, in a fraction of the time of a fit.

        Every network starts where it is and is trained as in a fit, in fewer steps; held-out counts of the new cells
        decide when it stops, how networks are weighed, and give the scores.

        Parameters
        ----------
        adata
            Counts and coordinates, with the genes of the fit in any order; not changed.
        effort
            Training steps at most, as a share of those of a fit; above 0, at most 1.
        table_key
            Of a SpatialData, the table; may be left out where there is only one.
        library_key, spatial_key, connectivity_key, layer, missing
            Where the data are; by default as in the fit.

        Returns
        -------
        A new model. This one stays as it is.

        Raises
        ------
        ValueError
            If the model is not fitted, or has a dispersion for each of its fields of view, or genes of the fit are
            missing from ``adata``; and as for :meth:`fit`.
        """
        effort = _checks.check_effort(effort)
        if self.settings.dispersion == "gene_fov":
            raise ValueError(
                "a model with settings={'dispersion': 'gene_fov'} belongs to its fields of view and cannot be tuned to "
                "others."
            )
        keys = self._keys_for(library_key, spatial_key, connectivity_key, layer, missing)
        tuned = copy.copy(self)
        tuned._fit_data(adata, keys, start=Start(self, effort))
        return tuned

    def _fit_predict(
        self,
        adata: AnnData,
        *,
        output: str,
        target_sum: float | None,
        columns: NDArray[np.int64] | None,
        gather: Callable[[int, int, int], GatheredT],
        checkpoint: Checkpoint | None = None,
        kept: int = 0,
    ) -> tuple[GatheredT, Opened]:
        """Fit, then impute and embed the same cells; graphs are built once where all cells take part in the fit.

        Parameters
        ----------
        adata
            Counts (cells × genes) and coordinates; not changed.
        output, target_sum
            Scale, as in :func:`spaformer_sc.tl.impute`.
        columns
            Genes to impute, as columns of ``adata``; None for all.
        gather
            Makes, from the numbers of cells, of genes and of latent dimensions, what takes the prediction.
        checkpoint
            Where the state of the fit is kept, to go on from after an interruption; None for nowhere.
        kept
            Bytes that the result will take in memory, for the estimate.

        Returns
        -------
        What has taken the prediction, and the data as they were opened.
        """
        _checks.check_choice("output", output, OUTPUTS)
        n_genes = adata.n_vars if columns is None else len(columns)
        opened, loaded = self._fit_data(adata, self.keys, checkpoint, kept=kept)
        gathered = gather(adata.n_obs, n_genes, self.settings.n_latent)
        with Workers(resolve_device(self.device)) as workers:
            self._predict(
                self._all_fields(opened) if loaded.cells is not None else loaded.fields,
                opened.read,
                gathered,
                workers,
                output=output,
                target_sum=target_sum or self.target_sum,
                genes=columns,
                embed=True,
                back=output == "lognorm" and self.posterior is not None,
                shown=True,
                ranks=self._ranks,
            )
        if loaded.cells is not None:
            self._spread_cell_scores(loaded.cells, gathered.embedding)
        return gathered, opened

    def _fit_data(
        self,
        adata: AnnData,
        keys: DataKeys,
        checkpoint: Checkpoint | None = None,
        start: Start | None = None,
        kept: int = 0,
    ) -> tuple[Opened, Loaded]:
        device = resolve_device(self.device)
        _checks.check_kind_of_devices(self.devices, device)
        _checks.check_adata(adata)
        opened = self._open(adata, keys, None if start is None else self._columns(adata))
        names = pd.Index(adata.var_names.astype(str)) if start is None else self.var_names
        _checks.describe_empty(opened.counts)
        _checks.describe_controls(adata)
        loaded = self._take(opened, most_fitted(adata.n_vars))
        _checks.check_enough_cells(self.devices, loaded.counts.shape[0])
        workers = Workers(device)
        masked, tuned = loaded.missing is not None, start is not None
        self._state_memory(loaded.fields, loaded.counts.shape, loaded.counts.nnz, masked, kept, workers, tuned=tuned)
        self._ranks = join(device) if self.devices > 1 and launched() else ALONE
        if checkpoint is not None:
            checkpoint.writes = self._ranks.first
            data = opened.digest(adata.var_names)
            checkpoint.begin({"version": __version__, "data": data, "device": device.type})
            self._ranks.wait()
        # From here on the earlier fit is gone: were this one interrupted, the model would be unfitted, not half fitted.
        self.var_names = None
        self.keys = keys
        self.n_cells = loaded.counts.shape[0]
        self.fractional = opened.counts.fractional
        self.settings = with_missing(self._chosen, loaded.hidden_as)
        with workers:
            self._fit(loaded, device, checkpoint, start, workers)
        self.var_names = names
        self.gene_scores.index = self.var_names
        return opened, loaded

    def _spread_cell_scores(self, cells: NDArray[np.int64], embedding: NDArray[np.float32]) -> None:
        """Give all cells the scores of the cells of the fit that they are most like."""
        from .training.reliability import closest

        by_kind = self.cell_scores.groupby(self._kind_of_cell).first()
        spread = by_kind.iloc[closest(embedding, self._kinds[by_kind.index])].reset_index(drop=True)
        spread.iloc[cells] = self.cell_scores.to_numpy()
        self.cell_scores = spread.astype(self.cell_scores.dtypes)

    def _state_memory(
        self,
        fields: Sequence[FieldOfView],
        shape: tuple[int, int],
        n_counts: int,
        masked: bool,
        kept: int,
        workers: Workers,
        *,
        tuned: bool = False,
    ) -> int:
        """Log the memory that a fit to some FOVs, of ``shape`` cells and genes together, takes; see `state_memory`."""
        from .training.sequences import BUFFER_BYTES

        s = self.settings
        n_cells, n_genes = shape
        largest = max(f.n_cells for f in fields)
        forms = [in_form(s, form) for form in s.forms[: s.n_networks]]
        weights = [n_weights(s, form, n_genes) for form in s.forms[: s.n_networks]]
        n_together = s.n_networks if tuned else max(len(forms), s.n_networks - len(forms))
        return state_memory(
            n_cells,
            n_genes,
            n_counts=n_counts,
            largest_fov=largest,
            step=min(max(form.training.tokens_per_step or largest for form in forms), n_cells),
            buffer=BUFFER_BYTES,
            n_inputs=1 + s.hops,
            n_decoded=10 if self._decodes_little(masked) else 14,
            width=max(n_computed(form) for form in forms),
            all_widths=3 * (sum(form.dim for form in forms) + (s.n_networks - len(forms)) * max(f.dim for f in forms)),
            weights=max(weights),
            all_weights=sum(weights) + (s.n_networks - len(weights)) * max(weights),
            n_trainings=1 if s.dropout or self.devices > 1 else min(workers.n, n_together),
            n_threads=workers.n,
            masked=masked,
            hides=masked or not {"thinning", "none"}.issuperset(s.masking),
            pooled=s.n_pooled > 0,
            kept=kept,
            n_workers=self.devices if self.devices > 1 and not launched() else 0,
        )

    def _decodes_little(self, missing: bool) -> bool:
        """Whether the decoder gives nothing per entry but the share."""
        s = self.settings
        dispersed = s.dispersion != "gene" or (s.posterior and (missing or s.masking != ("thinning",)))
        return s.decoder == "poisson" or s.decoder == "gaussian" or (s.decoder == "nb" and not dispersed)

    def _fit(
        self,
        loaded: Loaded,
        device: torch.device,
        checkpoint: Checkpoint | None,
        start: Start | None,
        workers: Workers,
    ) -> None:
        split, held_out, data = self._part(loaded, start)
        if self.devices > self._ranks.size:
            work = (self, data, split, held_out, checkpoint, start)
            shape_where_missing, found = launch(_trained, *work, devices=self.devices, device=device, threads=workers.n)
            for name, value in found.items():
                setattr(self, name, value)
            self._networks = [network.to(device) for network in self._networks]
        else:
            shape_where_missing = self._train(data, split, held_out, device, checkpoint, start, workers, self._ranks)
        give_back()
        self._score(split, loaded, shape_where_missing, workers)

    def _part(
        self, loaded: Loaded, start: Start | None = None
    ) -> tuple[HeldOut, NDArray[np.bool_] | None, list[FieldCounts]]:
        """Hold transcripts out, and entries where others are missing; and learn what networks need to know of the rest.

        Returns
        -------
        The parts of the transcripts; entries held out (cells, genes) or None; and the FOVs with what is left.
        """
        from .data._split import gene_shares, hold_out, hold_out_entries, typical_values
        from .training.sequences import sequences

        counts = self._integer_counts(loaded.counts)
        split = hold_out(
            counts,
            validation=VALIDATION_SHARE,
            test=TEST_SHARE,
            rng=np.random.default_rng(derived_seed(self.random_state, "held out")),
        )
        missing, train, held_out = loaded.missing, split.train, None
        if loaded.missing is not None:
            rng = np.random.default_rng(derived_seed(self.random_state, "held entries"))
            held_out = hold_out_entries(train, loaded.missing, loaded.images, HELD_ENTRIES, rng)
            missing = loaded.missing | held_out
            train = _without(train, held_out)
        self._gene_share = gene_shares(train, missing)
        library = np.asarray(loaded.counts.sum(axis=1)).ravel()
        if loaded.missing is not None:
            library = library / np.maximum(~loaded.missing @ self._gene_share, 1e-6)
        self.target_sum = float(np.median(library[library > 0]))
        kept = 1 - VALIDATION_SHARE - TEST_SHARE
        if start is None:
            self._model_sum = self.settings.model_sum or max(1.0, kept * self.target_sum)
        self._typical = typical_values(train, missing, self._gene_share, self._model_sum)
        self.graph_summary = loaded.graph_summary
        by_fov = self.settings.dispersion == "gene_fov"
        self._fovs = tuple(dict.fromkeys(f.image for f in loaded.fields)) if by_fov else ()
        return split, held_out, sequences(loaded.fields, train, missing)

    def _train(
        self,
        data: list[FieldCounts],
        split: HeldOut,
        held_out: NDArray[np.bool_] | None,
        device: torch.device,
        checkpoint: Checkpoint | None,
        start: Start | None,
        workers: Workers,
        ranks: Ranks,
    ) -> tuple[float, float] | None:
        """Train the networks on ``data``; return the shape of what is known of missing entries, None without any."""
        import torch

        from .training.mixing import HeldCounts, HeldEntries
        from .training.pooling import fit_concentration
        from .training.posterior import fit_shape_where_missing

        sampler = self._sampler(device)
        draw = torch.Generator().manual_seed(derived_seed(self.random_state, "validation"))
        validated = sampler.some(data, draw, VALIDATED_CELLS)
        entries = None
        if held_out is None:
            held = HeldCounts(validated, sampler, split.validation, self._shares, workers)
        else:
            of_others = _without(split.validation, held_out)
            held = HeldCounts(validated, sampler, of_others, self._shares, workers)
            entries = HeldEntries(validated, sampler, split.train, held_out, self._shares, self._model_sum, workers)
        histories = self._train_networks(data, sampler, held, entries, device, checkpoint, start, workers, ranks)
        self._concentration = math.inf
        if self.settings.n_pooled and held.enough:
            fitted = fit_concentration(self._networks, self._weights[0], held, self.settings.n_pooled)
            self._concentration, *_ = ranks.all(fitted)
            use = "not used" if math.isinf(fitted) else f"used, with concentration {self._concentration:g}"
            logger.info("counts of cells alike: %s", use)
        self.history = {
            "network": [float(i) for i, h in enumerate(histories) for _ in h.step],
            **{
                name: [float(value) for h in histories for value in getattr(h, name)]
                for name in ("step", "epoch", "loss", "validation")
            },
        }
        if entries is None or not len(entries.counts) or self.settings.decoder == "gaussian":
            return None
        expected = entries.expected(self._networks, self._weights[1], self._correction)
        return fit_shape_where_missing(expected, entries.counts)

    def _train_networks(
        self,
        data: list[FieldCounts],
        sampler: Sampler,
        held: HeldCounts,
        entries: HeldEntries | None,
        device: torch.device,
        checkpoint: Checkpoint | None,
        start: Start | None,
        workers: Workers,
        ranks: Ranks,
    ) -> list[History]:
        """Train the networks; what is held out chooses their form, how long they train, and their weights."""
        from .metrics import mixture_weights
        from .training.abreast import Task, train_abreast
        from .training.mixing import mix_in_own_counts
        from .training.progress import ProgressBar
        from .training.start import start_from_components, token_components
        from .training.trainer import Diverged, shortened

        s = self.settings
        candidates = s.forms[: s.n_networks] if start is None else tuple(self._forms)
        n_networks = s.n_networks if start is None else len(candidates)
        mixing = s.mixing and held.enough
        if entries is not None and not entries.enough:
            entries = None
        validate = partial(held.gain if entries is None else entries.gain, ranks=ranks)
        widest = max(in_form(s, form).dim for form in candidates)
        n_cells = sum(int(sequence.fov.own.sum()) for sequence in data)
        components = token_components(held.opened, widest, s.hops) if s.pca_start and start is None else None
        histories: list[History] = []
        parts: list[NDArray[np.float64]] = []
        predicted: list[NDArray[np.float64]] = []
        diverged: list[Diverged] = []
        self._networks, self._forms = [], []

        def train_further(first: int, forms: Sequence[str], trainings: Sequence[Training]) -> None:
            tasks = []
            for number, (form, training) in enumerate(zip(forms, trainings, strict=True), start=first):
                network = self._new_network(number, form).to(device)
                if start is not None:
                    training = start.training(training)
                    network.load_state_dict(start.weights(number), strict=False)
                if components is not None:
                    start_from_components(network, components)
                seed = derived_seed(self.random_state, f"training {number}")
                tasks.append(Task(number, network, training, seed, tuned=start is not None))
            bar = ProgressBar("training", self.progress and ranks.first, tasks[0].number, n_networks)
            results = train_abreast(tasks, data, sampler, validate, workers, bar, checkpoint, ranks)
            for form, result in zip(forms, results, strict=True):
                if isinstance(result, Diverged):
                    diverged.append(result)
                    continue
                trained, history = result
                if mixing:
                    parts.append(mix_in_own_counts(trained, held))
                if s.mixing and entries is not None:
                    predicted.append(entries.predicted(trained))
                self._networks.append(trained)
                self._forms.append(form)
                histories.append(history)

        train_further(0, candidates, [in_form(s, form, n_cells).training for form in candidates])
        if not self._networks or self._forms[0] == "perceptron":  # whose latent is none to be shown
            raise diverged[0]
        if n_more := n_networks - len(candidates):
            best_first = np.argsort([-history.best_score for history in histories], kind="stable")
            like = [int(number) for number in islice(cycle(best_first), n_more)]
            forms = [self._forms[number] for number in like]
            trainings = [
                shortened(in_form(s, self._forms[number], n_cells).training, histories[number]) for number in like
            ]
            train_further(len(candidates), forms, trainings)
        if diverged:
            logger.warning("%d of %d networks are left out: %s", len(diverged), n_networks, diverged[0])
        n_kept = len(self._networks)
        measured = mixture_weights(np.stack(parts), held.counts) if mixing else np.full(n_kept, 1 / n_kept)
        self._weights = np.stack([measured, measured])
        if s.mixing and entries is not None:
            self._weights[1] = entries.weights(np.stack(predicted))
        shown = self._weights[0 if entries is None else 1]
        for number, (history, form, weight) in enumerate(zip(histories, self._forms, shown, strict=True)):
            logger.info(
                "network %d: %s, best after %d steps, %.4f nats per held-out transcript over gene means, weight %.2f",
                number + 1,
                form,
                history.best_step,
                history.best_score,
                weight,
            )
        return histories

    def _described_networks(self) -> dict[str, Any]:
        """Say what was chosen for each network, for files."""
        return {
            "form": list(self._forms),
            "weight": self._weights[0].tolist(),
            "weight_where_missing": self._weights[1].tolist(),
            "concentration": None if math.isinf(self._concentration) else self._concentration,
        }

    def _score(
        self, split: HeldOut, loaded: Loaded, shape_where_missing: tuple[float, float] | None, workers: Workers
    ) -> None:
        """Score the rates predicted from the training part on the test part, overall and per gene.

        And fit the posterior to the validation part.
        """
        from .training.reliability import groups_alike, neighbour_rates, scores_of_groups
        from .training.scoring import held_out_scores, scores_of_neighbours
        from .training.sequences import sequences

        train, missing = split.train, loaded.missing
        found = InMemory(train.shape[0], train.shape[1], self.settings.n_latent)

        def read(field: FieldOfView) -> FieldCounts:
            return sequences([field], train, missing)[0]

        self._predict(
            loaded.fields,
            read,
            found,
            workers,
            output="rate",
            target_sum=1.0,
            genes=None,
            embed=True,
            ranks=self._ranks,
        )
        rates = found.expression
        rng = np.random.default_rng(derived_seed(self.random_state, "groups of cells"))
        self.scores, self.gene_scores, gains = held_out_scores(split.test, rates, train, missing, rng)
        held_out = np.asarray(split.test.sum(axis=1), dtype=np.float64).ravel()
        alike, self._kinds = groups_alike(found.embedding, derived_seed(self.random_state, "cells alike"))
        self._kind_of_cell = alike
        self.cell_scores = scores_of_groups(gains, held_out, alike).iloc[alike].reset_index(drop=True)
        self.fov_scores = scores_of_groups(gains, held_out, loaded.images)
        names = {int(loaded.images[f.cells[0]]): f.image for f in loaded.fields}
        self.fov_scores.index = pd.Index([names[number] for number in range(len(names))])
        self.posterior = self._calibrated(rates, split, missing, shape_where_missing)
        del rates, found
        give_back()
        around = neighbour_rates(loaded.fields, train, split.validation, missing, self._shares)
        overall, per_gene = scores_of_neighbours(split.test, around, train, missing)
        self.scores |= overall
        self.gene_scores = self.gene_scores.join(per_gene)
        if np.isnan(self.scores["gain_over_baseline_se"]):
            logger.warning(
                "too few transcripts or cells to hold some out: nothing can be said of how good the result is."
            )
        elif not self.scores["better_than_baseline"]:
            logger.warning(
                "the imputation was not shown to be better than each gene's mean and own counts: %.4f nats gained on "
                "each held-out transcript, with a standard error of %.4f. Do not rely on it: the cells or transcripts "
                "may be too few to tell, or too few to learn from, or the genes unrelated to one another.",
                self.scores["gain_over_baseline"],
                self.scores["gain_over_baseline_se"],
            )

    def _calibrated(
        self,
        rates: NDArray[np.float32],
        split: HeldOut,
        missing: NDArray[np.bool_] | None,
        shape_where_missing: tuple[float, float] | None,
    ) -> Posterior | None:
        """Posterior of the entries, fitted to the validation part, with its coverage of the test part.

        None for a decoder without counts. Where too little was held out of entries that are missing, their posterior
        is that of measured entries without their counts.
        """
        from .training.posterior import Posterior, fit_shape, measure_coverage

        if self.settings.decoder == "gaussian":
            return None
        measured = None if missing is None else ~missing
        depth = np.asarray(split.train.sum(axis=1), dtype=np.float64).ravel()
        if measured is not None:
            depth /= np.maximum(np.einsum("cg,cg->c", rates, measured), 1e-12)
        level, slope, own = fit_shape(rates, depth, split.train, split.validation, measured)
        posterior = Posterior(level, slope, own, missing=shape_where_missing or (level, slope))
        rng = np.random.default_rng(derived_seed(self.random_state, "coverage"))
        return measure_coverage(posterior, rates, depth, split.train, split.test, measured, rng)

    # --- prediction ---------------------------------------------------------------------------------------------------

    @takes_tables
    def impute(
        self,
        adata: AnnData | SpatialData,
        *,
        output: str = "lognorm",
        target_sum: float | None = None,
        genes: Any = None,
        table_key: str | None = None,
        library_key: str | Sequence[str] | None = AS_FITTED,
        spatial_key: str = AS_FITTED,
        connectivity_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        missing: str | None = AS_FITTED,
    ) -> NDArray[np.float32]:
        """Impute the expression of cells with the fitted model; they need not be those of the fit.

        Parameters
        ----------
        adata
            Counts and coordinates, with the genes of the fit in any order; not changed.
        output, target_sum, genes
            Scale and genes of the result, as in :func:`spaformer_sc.tl.impute`.
        table_key
            Of a SpatialData, the table; may be left out where there is only one.
        library_key, spatial_key, connectivity_key, layer, missing
            Where the data are; by default as in the fit.

        Returns
        -------
        Imputed expression, float32 (cells × genes asked for), genes in the order of ``genes`` or of ``adata``; genes
        of ``adata`` that the model does not know are NaN.

        Raises
        ------
        ValueError
            If the model is not fitted, or genes of the fit are missing from ``adata``; the message names them.
        """
        keys = self._keys_for(library_key, spatial_key, connectivity_key, layer, missing)
        return self._predict_adata(
            adata, keys, output=output, target_sum=target_sum, genes=genes, embed=False
        ).expression

    @takes_tables
    def embed(
        self,
        adata: AnnData | SpatialData,
        *,
        table_key: str | None = None,
        library_key: str | Sequence[str] | None = AS_FITTED,
        spatial_key: str = AS_FITTED,
        connectivity_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        missing: str | None = AS_FITTED,
    ) -> NDArray[np.float32]:
        """Return the latent of cells, float32 (cells × n_latent); arguments and errors as in :meth:`impute`.

        Where several networks are averaged, it is the latent of the first.
        """
        keys = self._keys_for(library_key, spatial_key, connectivity_key, layer, missing)
        return self._predict_adata(adata, keys, output=None, target_sum=None, genes=None, embed=True).embedding

    def _predict_adata(
        self,
        adata: AnnData,
        keys: DataKeys,
        *,
        output: str | None,
        target_sum: float | None,
        genes: Any,
        embed: bool,
    ) -> InMemory:
        """Impute and embed in one pass; what :meth:`impute` and :meth:`embed` are made of."""
        if self.var_names is None:
            raise ValueError("this SpaFormer is not fitted; call `.fit(adata)` first, or `SpaFormer.load(path)`.")
        if output is not None:
            _checks.check_choice("output", output, OUTPUTS)
        if target_sum is not None:
            target_sum = _checks.check_number("target_sum", target_sum, *TARGET_SUMS)
        _checks.check_adata(adata)
        asked = np.arange(adata.n_vars) if genes is None else _checks.check_genes(adata, genes)
        opened, columns = self._open_like_the_fit(adata, keys)
        position = {int(column): i for i, column in enumerate(columns)}
        known = np.array([position.get(int(column), -1) for column in asked], dtype=np.int64)
        genes = known[known >= 0]
        gathered = InMemory(adata.n_obs, 0 if output is None else len(genes), self.settings.n_latent if embed else 0)
        with Workers(resolve_device(self.device)) as workers:
            self._predict(
                self._all_fields(opened),
                opened.read,
                gathered,
                workers,
                output=output,
                target_sum=self.target_sum if target_sum is None else target_sum,
                genes=genes,
                embed=embed,
            )
        if output is not None and len(genes) < len(asked):
            expression = np.full((adata.n_obs, len(asked)), np.nan, dtype=np.float32)
            expression[:, known >= 0] = gathered.expression
            gathered.expression = expression
        return gathered

    def _all_fields(self, opened: Opened) -> Iterator[FieldOfView]:
        for fields, _ in opened.layout.fields():
            yield from fields

    def _predict(
        self,
        fields: Iterable[FieldOfView],
        read: Callable[[FieldOfView], FieldCounts],
        gathered: Gathered,
        workers: Workers,
        *,
        output: str | None,
        target_sum: float,
        genes: NDArray[np.int64] | None,
        embed: bool,
        back: bool = False,
        shown: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Predict FOV by FOV, those that are not gathered yet; networks are averaged in the scale asked for.

        With ``back``, for log-normalised values, also find what leads from these back to expected counts. Ranks divide
        the FOVs, each to the one that has fewest cells so far, and all get the whole.
        """
        from .training.progress import ProgressBar

        sampler = self._sampler(resolve_device(self.device))
        done = n_fields = 0
        load = np.zeros(ranks.size, dtype=np.int64)
        with ProgressBar("imputing", self.progress and shown and ranks.first, unit="cell") as bar:
            for number, field in enumerate(fields):
                inside = np.flatnonzero(field.weight > 0)
                whose = int(load.argmin())
                load[whose] += field.n_cells
                n_fields += 1
                if whose != ranks.rank:
                    gathered.leave(len(inside))
                elif not gathered.has(number):
                    n_some = 0
                    if back:
                        n_some = -(-LED_BACK * len(inside) // gathered.n_cells)
                        n_some = max(n_some, LEAST_LED_BACK) if n_some > 1 else n_some  # few of each of very many
                    rng = np.random.default_rng(derived_seed(self.random_state, f"cells to lead back from {number}"))
                    some = np.sort(rng.choice(len(inside), min(len(inside), n_some), replace=False))
                    sequence = read(field)
                    whole = sampler.open(sequence)
                    measured = sequence.measured
                    measured = None if measured is None else measured[inside]
                    block = self._predict_field(
                        whole, inside, measured, some, workers, output, target_sum, genes, embed
                    )
                    sums = [part.sum(dtype=np.float64) for part in (block.expression, block.embedding, block.depth)]
                    if not np.isfinite(sums).all():
                        raise ValueError(
                            f"what is predicted of the field of view {field.image!r} is not finite: look for extreme "
                            f"values among its counts and coordinates; `target_sum` is {target_sum:g}."
                        )
                    gathered.add(number, field.cells[inside], field.weight[inside], block)
                    del sequence, whole, block  # before the next is read
                    give_back()
                done += int(field.own.sum())
                bar.update(done, gathered.n_cells)
        if ranks.size > 1:
            gathered.unite(n_fields, ranks)
        give_back()

    def _predict_field(
        self,
        whole: Whole,
        inside: NDArray[np.int64],
        measured: NDArray[np.bool_] | None,
        some: NDArray[np.int64],
        workers: Workers,
        output: str | None,
        target_sum: float,
        genes: NDArray[np.int64] | None,
        embed: bool,
    ) -> Block:
        """Predict the cells ``inside`` a FOV; ``measured`` entries of these; lead ``some`` back to expected counts."""
        import torch

        from .training.mixing import uncorrected
        from .training.prediction import Said

        n_genes = 0 if output is None else len(self._shares) if genes is None else len(genes)
        columns = slice(None) if genes is None else genes
        mean = np.zeros((len(inside), n_genes), dtype=np.float32)
        latent = np.zeros((len(inside), self.settings.n_latent if embed else 0), dtype=np.float32)
        depth = np.zeros(len(inside), dtype=np.float32)
        counts = np.zeros((len(some), n_genes), dtype=np.float32)
        said = Said(self._networks[:1] if output is None else self._networks, whole, workers)
        corrected = uncorrected if output is None else self._correction(said, inside)

        def predict(at: slice, tokens: Tokens, outputs: Iterator[Output]) -> None:
            correct = corrected(at)
            total = np.zeros((at.stop - at.start, 1), dtype=np.float32)
            led = slice(*np.searchsorted(some, [at.start, at.stop]))
            led_rows = some[led] - at.start
            for number, (network, raw) in enumerate(zip(said.networks, outputs, strict=True)):
                if embed and number == 0:
                    latent[at] = raw.latent.cpu().numpy()
                if output is None:
                    return
                result = correct(network, raw)
                share, where_missing = self._weights[:, number].astype(np.float32)
                weights = share if measured is None else np.where(measured[at], share, where_missing)
                part = self._scaled(network, result, tokens, output, target_sum).cpu().numpy()
                part *= weights
                if measured is not None:
                    total += part.sum(axis=1, keepdims=True)
                mean[at] += part[:, columns]
                shares = network.decoder.share(result.decoded)
                full = tokens.full_depth(shares)
                depth[at] += share * full.cpu().numpy()
                if len(led_rows):
                    rows = torch.from_numpy(led_rows).to(full.device)
                    part = (shares[rows] * full[rows, None]).cpu().numpy()
                    part *= weights if measured is None else weights[led_rows]
                    counts[led] += part[:, columns]
            if output == "rate" and measured is not None:
                # Each network's rates have this sum, but not their mean with weights that differ within a cell.
                mean[at] *= target_sum / total

        for _ in said.in_blocks(predict, torch.from_numpy(inside)):
            pass
        led_back = None
        if len(some):
            seen = np.ones(counts.shape, dtype=bool) if measured is None else measured[some][:, columns]
            led_back = counts, mean[some], depth[some], seen
        return Block(mean, latent, depth, led_back)

    def _correction(self, said: Said, cells: NDArray[np.int64] | None = None) -> Correction:
        """What the counts of cells alike do to what the networks say of some cells of a FOV, None for all."""
        from .training.pooling import correction

        return correction(said, self._weights[0], self.settings.n_pooled, self._concentration, cells)

    @staticmethod
    def _scaled(network: Network, result: Output, tokens: Tokens, output: str, target_sum: float) -> torch.Tensor:
        decoder = network.decoder
        share = decoder.share(result.decoded)
        if output == "rate":
            return share * target_sum
        depth = tokens.full_depth(share)
        if output == "counts":
            return decoder.counts(result.decoded, depth)
        return decoder.lognorm(result.decoded, depth, target_sum)

    # --- loading data -------------------------------------------------------------------------------------------------

    def _keys_for(
        self,
        library_key: str | Sequence[str] | None,
        spatial_key: str,
        connectivity_key: str | None,
        layer: str | None,
        missing: str | None,
    ) -> DataKeys:
        given = {
            "library_key": _as_key(library_key),
            "spatial_key": spatial_key,
            "connectivity_key": connectivity_key,
            "layer": layer,
            "missing": missing,
        }
        found = {
            name: getattr(self.keys, name) if isinstance(value, str) and value == AS_FITTED else value
            for name, value in given.items()
        }
        return DataKeys(**found)  # type: ignore[arg-type]

    def _integer_counts(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        if _checks.is_whole(counts):
            return counts
        rng = np.random.default_rng(derived_seed(self.random_state, "rounding"))
        return _checks.integerize(counts, rng)

    def _columns(self, adata: AnnData) -> NDArray[np.int64]:
        """Columns of ``adata`` that hold the model's genes, in the model's order."""
        if self.var_names is None:
            raise ValueError("this SpaFormer is not fitted; call `.fit(adata)` first.")
        columns = adata.var_names.get_indexer(self.var_names)
        absent = self.var_names[columns < 0]
        if len(absent):
            raise ValueError(
                f"`adata` lacks {len(absent)} of the {len(self.var_names)} genes that the model was fitted on: "
                f"{', '.join(absent[:10])}{', …' if len(absent) > 10 else ''}. Pass data with these genes, or fit a "
                "model on the genes that both have."
            )
        unknown = adata.n_vars - len(columns)
        if unknown:
            logger.warning(
                "%d genes of `adata` are not in the model; they are not used, and not imputed (NaN).", unknown
            )
        return np.asarray(columns, dtype=np.int64)

    def _read(self, adata: AnnData, keys: DataKeys) -> tuple[Loaded, NDArray[np.int64]]:
        """Take apart data for the fitted model; also the columns of ``adata`` that hold the model's genes."""
        opened, columns = self._open_like_the_fit(adata, keys)
        return self._take(opened), columns

    def _open_like_the_fit(self, adata: AnnData, keys: DataKeys) -> tuple[Opened, NDArray[np.int64]]:
        columns = self._columns(adata)
        return self._open(adata, keys, columns, "warn" if self.fractional else "refuse"), columns

    def _open(
        self,
        adata: AnnData,
        keys: DataKeys,
        columns: NDArray[np.int64] | None = None,
        transformed: Literal["refuse", "warn"] = "refuse",
    ) -> Opened:
        """Check everything that is read: counts, FOVs, coordinates, entries not measured, the user's graph."""
        from .data._counts import Counts
        from .data._graph import given_graph
        from .data._labels import field_codes

        found = read_or_scan(adata, keys.layer, transformed)
        library = _checks.check_library_key(adata, keys.library_key)
        codes, names = field_codes(adata.obs, library)
        coordinates = _checks.check_coordinates(adata, keys.spatial_key, codes)
        _checks.check_images_apart(adata, keys.spatial_key, coordinates, codes, library)
        missing = _checks.check_layer_of_missing(adata, keys.missing)
        if columns is not None:
            missing = None if missing is None else missing[:, columns]
            found = found.of(columns) if isinstance(found, Counts) else found[:, columns].tocsr()
        given = None
        if keys.connectivity_key is not None:
            given = given_graph(_checks.check_connectivities(adata, keys.connectivity_key), codes)
        return Opened(as_counts(found, missing), missing, self._layout(coordinates, codes, names, given))

    def _layout(
        self,
        coordinates: NDArray[np.float64],
        codes: NDArray[np.int64],
        names: list[str],
        given: sp.csr_matrix | None,
    ) -> Layout:
        """Say how the data are cut into FOVs and tiles, with which graphs and encodings."""
        from .data._fields import GraphConfig, Layout

        positional = self._positional()
        return Layout(
            coordinates,
            codes,
            names,
            graph=GraphConfig(self.graph, self.n_neighbors, self.radius),
            given=given,
            n_rings=self.settings.hops,
            tile_size=self.tile_size,
            encode=None if positional is None else positional.features,
        )

    def _take(self, opened: Opened, most: int | None = None) -> Loaded:
        """Take cells into memory with their FOVs: all, or some FOVs and tiles drawn at random with ``most`` cells."""
        layout = opened.layout
        n_cells = len(layout.codes)
        fields, summary, cells = self._choose(layout, opened.missing, most)
        if cells is not None:
            logger.info("the model is fitted to %d of %d cells, %d fields of view", len(cells), n_cells, len(fields))
        self._warn_of_components(summary)
        rows = np.arange(n_cells) if cells is None else cells
        counts = opened.counts.rows(rows)
        missing = None if opened.missing is None else opened.missing if cells is None else opened.missing[cells]
        if missing is not None:
            counts = _without(counts, missing)
            _checks.check_some_left(counts.nnz)
        images = layout.codes if cells is None else np.unique(layout.codes[cells], return_inverse=True)[1]
        return Loaded(counts, fields, missing, images, summary, cells)

    def _choose(
        self, layout: Layout, missing: NDArray[np.bool_] | None, most: int | None = None
    ) -> tuple[list[FieldOfView], dict[str, Any], NDArray[np.int64] | None]:
        """Build the FOVs and tiles that :meth:`_take` takes; a summary of the graphs; and the cells, None for all."""
        from .data._fields import fields_of_view, on_their_own, some_images
        from .data._tiling import is_tiled

        n_cells = len(layout.codes)
        if most is None or n_cells <= most:
            return *fields_of_view(layout), None
        rng = np.random.default_rng(derived_seed(self.random_state, "cells of the fit"))
        sizes = np.bincount(layout.codes)
        tiled = is_tiled(sizes, self.tile_size)
        measured = None
        if missing is not None:
            measured = np.stack([~missing[layout.codes == code].all(axis=0) for code in range(len(sizes))])
        chosen = some_images(sizes, most, tiled, measured, rng)
        fields, summary = fields_of_view(layout, chosen, most / n_cells, rng)
        fields, cells = on_their_own(fields)
        return fields, summary, cells

    def _warn_of_components(self, summary: Mapping[str, int | float]) -> None:
        positional = self._positional()
        if positional is not None and positional.reads_components and summary["n_components"] > 2 * summary["n_fovs"]:
            logger.warning(
                "the spatial graph falls apart: %d connected components in %d fields of view, and graph encodings see "
                "one component only. Use a larger `n_neighbors` or `radius`, or graph='delaunay'.",
                summary["n_components"],
                summary["n_fovs"],
            )

    # --- networks -----------------------------------------------------------------------------------------------------

    @property
    def _shares(self) -> NDArray[np.float32]:
        if self._gene_share is None:
            raise ValueError("this SpaFormer is not fitted; call `.fit(adata)` first.")
        return self._gene_share

    def _positional(self, seed: int = 0, form: str = "plain") -> CombinedEncodings | None:
        s = in_form(self.settings, form)
        if not s.positional:
            return None
        from .nn.seeding import seeded
        from .positional import build_positional

        with seeded(seed):
            return build_positional(
                s.positional,
                s.dim,
                k=s.n_eigenvectors,
                n_frequencies=s.n_frequencies,
                patch_size=s.patch_size,
                combine=s.positional_combine,
            )

    def _network_config(self, form: str) -> NetworkConfig:
        from .nn.network import NetworkConfig

        s = in_form(self.settings, form)
        return NetworkConfig(
            n_genes=len(self._shares),
            dim=s.dim,
            n_layers=s.n_layers,
            n_heads=s.n_heads,
            feedforward=s.feedforward,
            n_latent=s.n_latent,
            encoder=s.encoder,
            decoder=s.decoder,
            variational=s.variational,
            hops=s.hops,
            posterior=s.posterior,
            dropout=s.dropout,
            target_sum=self._model_sum,
            dispersion=s.dispersion,
            fovs=self._fovs,
            wide=form in ("wide", "large"),
            perceptron=form == "perceptron",
        )

    def _new_network(self, number: int, form: str) -> Network:
        import torch

        from .nn.network import Network

        def seed(part: str) -> int:
            return derived_seed(self.random_state, f"weights {part} {number}")

        parts = ("embedding", "neighbours", "encoder", "decoder", "variational")
        return Network(
            self._network_config(form),
            gene_share=torch.from_numpy(self._shares),
            positional=self._positional(seed("positional"), form),
            seeds={part: seed(part) for part in parts},
        )

    def _sampler(self, device: torch.device) -> Sampler:
        import torch

        from .nn.masking import MaskingSchedule
        from .training.sequences import Sampler

        s = self.settings
        module = self._positional()
        return Sampler(
            tokens_per_step=s.training.tokens_per_step,
            corruptions=s.masking,
            rates=MaskingSchedule(s.training.masked_tokens, s.training.masked_features, s.training.thinning),
            gene_share=torch.from_numpy(self._shares),
            target_sum=self._model_sum,
            typical=torch.from_numpy(self._typical) if s.typical_fill else None,
            positional=None if module is None else "graph" if module.needs_graph else "rows",
            graph=bool(s.graph_readers),
            windows=s.training.windows,
            device=device,
        )

    def parameters(self) -> dict[str, Any]:
        """Every parameter and decided choice as numbers, strings, booleans, lists and None, for ``uns``."""
        s = self.settings.to_dict()
        return {
            **vars(self.keys),
            "graph": self.graph,
            "n_neighbors": self.n_neighbors,
            "radius": self.radius,
            "tile_size": self.tile_size,
            "random_state": self.random_state,
            "devices": self.devices,
            "fractional": self.fractional,
            "model": {key: value for key, value in s.items() if key != "training"},
            "training": s["training"],
            "graph_summary": self.graph_summary,
            "networks": self._described_networks(),
        }

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Save the fitted model as a folder with ``model.json`` and ``weights.safetensors``.

        The folder appears whole or not at all.

        Parameters
        ----------
        path
            Folder to write.
        overwrite
            Replace a saved model that is there already.

        Raises
        ------
        ValueError
            If the model is not fitted.
        FileExistsError
            If ``path`` exists and ``overwrite`` is False, or is not a saved model.
        """
        if self.var_names is None:
            raise ValueError("this SpaFormer is not fitted; there is nothing to save.")
        description = {
            "version": __version__,
            "settings": self.settings.to_dict(),
            "keys": vars(self.keys),
            "graph": {"method": self.graph, "n_neighbors": self.n_neighbors, "radius": self.radius},
            "tile_size": self.tile_size,
            "random_state": self.random_state,
            "var_names": list(self.var_names),
            "n_cells": self.n_cells,
            "target_sum": self.target_sum,
            "model_sum": self._model_sum,
            "fractional": self.fractional,
            "fovs": list(self._fovs),
            "networks": self._described_networks(),
            "scores": self.scores,
            "posterior": None if self.posterior is None else self.posterior.to_dict(),
            "gene_scores": {name: self.gene_scores[name].tolist() for name in self.gene_scores},
            "history": self.history,
            "graph_summary": self.graph_summary,
        }
        weights = {"gene_share": _tensor(self._shares), "typical": _tensor(self._typical)}
        for number, network in enumerate(self._networks):
            for name, tensor in network.state_dict().items():
                weights[f"networks.{number}.{name}"] = tensor.detach().cpu().contiguous()
        write_model(path, description, weights, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "auto", progress: bool | None = None) -> SpaFormer:
        """Load a model saved with :meth:`save`. Nothing in the file is executed.

        Parameters
        ----------
        path
            The folder.
        device, progress
            As in the constructor.

        Raises
        ------
        FileNotFoundError
            If there is no saved model at ``path``.
        ValueError
            If it is not a saved model, is damaged, or was written in another format.
        """
        from .training.pooling import CONCENTRATIONS
        from .training.posterior import Posterior
        from .training.reliability import LEVELS

        target = resolve_device(device)
        progress = _checks.check_flag("progress", defaults.progress if progress is None else progress)
        description, weights = read_model(path)
        try:
            graph = description["graph"]
            model = cls(
                graph=graph["method"],
                n_neighbors=graph["n_neighbors"],
                radius=graph["radius"],
                tile_size=description["tile_size"],
                random_state=description["random_state"],
                device=device,
                progress=progress,
            )
            model.settings = model._chosen = Settings.from_dict(description["settings"])
            model.keys = DataKeys(**description["keys"])
            if not all(isinstance(key, str | None) for name, key in vars(model.keys).items() if name != "library_key"):
                raise TypeError(f"its keys must be names, not {vars(model.keys)}")
            model.target_sum = _checks.check_number("target_sum", description["target_sum"], *TARGET_SUMS)
            model._model_sum = _checks.check_number("model_sum", description["model_sum"], *TARGET_SUMS)
            model.fractional = _checks.check_flag("fractional", description["fractional"])
            model._fovs = tuple(str(name) for name in description.get("fovs", []))
            n_cells = description.get("n_cells")
            model.n_cells = None if n_cells is None else _checks.check_integer("n_cells", n_cells)
            model._forms = [str(form) for form in description["networks"]["form"]]
            names = ("weight", "weight_where_missing")
            model._weights = np.array([description["networks"][name] for name in names], dtype=np.float64)
            n_networks = len(model._forms)
            if not (model._weights.shape == (2, n_networks) and 0 < n_networks <= model.settings.n_networks):
                raise ValueError("its networks and what it says of them differ in number")
            _check_shares("the weights of its networks", model._weights)
            concentration = description["networks"].get("concentration")
            if concentration is not None:
                if not model.settings.n_pooled or model.settings.decoder == "gaussian":
                    raise ValueError("it has a concentration for counts of cells alike, and does not use them")
                low, *_, high = CONCENTRATIONS
                model._concentration = _checks.check_number("concentration", concentration, low, high)
            model.scores, model.history = description["scores"], description["history"]
            given = description["posterior"]
            model.posterior = None if given is None else Posterior.from_dict(given)
            model.graph_summary = description["graph_summary"]
            model._gene_share = weights.pop("gene_share").numpy()
            model._typical = weights.pop("typical").numpy()
            if not model._typical.shape == model._gene_share.shape == (len(description["var_names"]),):
                raise ValueError("its genes, their shares and their typical values differ in number")
            _check_shares("the shares of its genes", model._gene_share)
            names = pd.Index([str(name) for name in description["var_names"]])
            if not names.is_unique:
                raise ValueError("some of its genes have the same name")
            model.gene_scores = pd.DataFrame(description["gene_scores"], index=names)
            model.gene_scores["reliability"] = pd.Categorical(
                model.gene_scores["reliability"], categories=list(LEVELS), ordered=True
            )
            if model._forms[0] == "perceptron":
                raise ValueError("its first network has no latent")
            for number, form in enumerate(model._forms):
                _checks.check_choice("form", form, FORMS)
                _check_sizes(in_form(model.settings, form), weights)
                network = model._new_network(number, form)
                prefix = f"networks.{number}."
                network.load_state_dict(
                    {k.removeprefix(prefix): weights.pop(k) for k in list(weights) if k.startswith(prefix)}
                )
                for name in ("mixture", "gene_share"):
                    if hasattr(network.decoder, name):
                        _check_shares(f"`{name}` of its networks", getattr(network.decoder, name).numpy())
                model._networks.append(network.to(target).eval())
            if weights:
                raise ValueError("it holds weights that its description does not account for")
            model.var_names = names
        except UNREADABLE as error:
            raise ValueError(f"{os.fspath(path)} is damaged or not a saved model: {error}") from error
        return model


def _check_shares(what: str, values: NDArray[np.floating]) -> None:
    """Refuse values that are negative or do not sum to 1 in each row."""
    if not (values >= 0).all() or (abs(values.sum(axis=-1) - 1) > 1e-3).any():
        raise ValueError(f"{what} are no shares")


def _check_sizes(settings: Settings, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a network of sizes that no weights of its file have, before memory is taken for it."""
    from .positional import POSITIONAL

    used = {option for name in settings.positional for option in POSITIONAL[name].options}
    sizes = [
        settings.dim * (settings.feedforward if settings.n_layers else 1),
        settings.n_latent,
        settings.n_eigenvectors if "k" in used else 0,
        settings.n_frequencies if "n_frequencies" in used else 0,
    ]
    largest = max(1000, *(n for tensor in weights.values() for n in tensor.shape))
    if max(sizes) > largest or settings.n_layers > len(weights):
        raise ValueError("its networks are larger than its weights")


def _trained(
    ranks: Ranks,
    model: SpaFormer,
    data: list[FieldCounts],
    split: HeldOut,
    held_out: NDArray[np.bool_] | None,
    checkpoint: Checkpoint | None,
    start: Start | None,
) -> tuple[tuple[float, float] | None, dict[str, Any]]:
    """Train the networks of a model in a process started for it; return what :meth:`SpaFormer._train` sets."""
    if checkpoint is not None:
        checkpoint.writes = ranks.first
    with Workers(ranks.device) as workers:
        shape = model._train(data, split, held_out, ranks.device, checkpoint, start, workers, ranks)
    model._networks = [network.cpu() for network in model._networks]
    return shape, {
        name: getattr(model, name) for name in ("_networks", "_forms", "_weights", "_concentration", "history")
    }


def resolve_device(device: str, argument: str = "device") -> torch.device:
    """Device by name; "auto" is that of ``settings``, by default the first GPU if there is one.

    Raises
    ------
    TypeError
        If it is not a name.
    ValueError
        If the name is unknown or the device is not there.
    """
    wait_patiently()
    import torch

    if isinstance(device, str) and device == "auto":
        device = defaults.device
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"`{argument}={device!r}` must be a string, such as 'auto', 'cpu' or 'cuda:1'.")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`{argument}={device!r}` cannot be used here ({reason}); 'auto' and 'cpu' always can."
        ) from error
    return found


def _as_key(library_key: str | Sequence[str] | None) -> str | list[str] | None:
    # Anything else is refused, with a message, when the key is looked up.
    return list(library_key) if isinstance(library_key, (list, tuple)) else library_key  # type: ignore[return-value]


def most_fitted(n_genes: int) -> int:
    """Cells that a model of so many genes is fitted to, about; of more, some fields of view are drawn at random."""
    return max(LEAST_FITTED, FITTED_ENTRIES // n_genes)


def read_or_scan(
    adata: AnnData, layer: str | None, transformed: Literal["refuse", "warn"] = "refuse"
) -> sp.csr_matrix | Counts:
    """Check all counts: a matrix where they are in memory, else what reads them."""
    if _checks.lies_outside_memory(adata, layer):
        return _checks.scan_counts(adata, layer, transformed=transformed)
    return _checks.read_counts(adata, layer, transformed=transformed)


def as_counts(found: sp.csr_matrix | Counts, missing: NDArray[np.bool_] | None) -> Counts:
    """What :func:`read_or_scan` gives as counts, without those of ``missing`` entries where they are in memory."""
    from .data._counts import Counts, in_memory

    if isinstance(found, Counts):
        return found
    matrix = found if missing is None else _without(found, missing)
    return in_memory(matrix, not _checks.is_whole(matrix))


def _without(counts: sp.csr_matrix, entries: NDArray[np.bool_]) -> sp.csr_matrix:
    """Counts (cells, genes) with 0 at ``entries``."""
    left = counts.multiply(~entries).tocsr().astype(np.float32)
    left.eliminate_zeros()
    return left


def _tensor(array: NDArray[np.float32]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
