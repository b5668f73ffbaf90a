"""``sf.pp.check``: what impute will find and do, before any work is started."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._config import ADVANCED
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._keys import Keys
from spaformer_sc._logging import logger
from spaformer_sc._memory import available_memory
from spaformer_sc._threads import Workers
from spaformer_sc.data._labels import field_codes
from spaformer_sc.data._tiling import is_tiled, tile
from spaformer_sc.model import TEST_SHARE, Opened, SpaFormer, as_counts, most_fitted, read_or_scan, resolve_device
from spaformer_sc.pp._report import CheckReport, Finding, Level

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spaformer_sc.data._counts import Counts
    from spaformer_sc.data._fields import FieldOfView, Layout

SUBJECTS = (
    "cells and genes",
    "counts",
    "missing entries",
    "fields of view",
    "positions",
    "spatial graph",
    "result",
    "device",
    "what happens",
    "memory",
    "time",
)
"""What findings are about, in the order of the report."""

FEW_COUNTS = 10_000
"""Below that there is little to learn from, and little to tell how good it is."""

SMALL_FOV = 50
"""Cells of a field of view below which it is named."""

MANY = 0.01
"""Share of the cells from which what is odd about them is no longer just noted."""

IN_UM = 4.0, 40.0
"""Cells of most tissues are that far from their neighbours, in µm."""


class _Findings:
    """What has been found so far."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def add(self, level: Level, subject: str, finding: str, advice: str = "") -> None:
        """Add a finding, unless it is there."""
        found = Finding(level, subject, finding, advice)
        if found not in self.all:
            self.all.append(found)

    @contextmanager
    def of(self, subject: str, level: Level = "warning", advice: str = "") -> Iterator[None]:
        """Make findings of what checks raise, warn of and log, in place of these."""
        messages: list[str] = []
        thread = threading.get_ident()

        def keep_back(record: logging.LogRecord) -> bool:
            if record.thread != thread:
                return True
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())
            return False

        logger.addFilter(keep_back)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                yield
        except (KeyError, TypeError, ValueError, MemoryError) as error:
            self.add("error", subject, str(error.args[0] if error.args else error))
        finally:
            logger.removeFilter(keep_back)
            for message in [*messages, *(str(w.message) for w in warned if w.category is UserWarning)]:
                self.add(level, subject, message, advice)

    def report(self, title: str) -> CheckReport:
        """All findings, by subject."""
        return CheckReport(title, tuple(sorted(self.all, key=lambda finding: SUBJECTS.index(finding.subject))))

    @property
    def errors(self) -> bool:
        """Whether there is one."""
        return any(finding.level == "error" for finding in self.all)


@_checks.explains_unknown_arguments(ADVANCED)
@takes_tables
def check(
    adata: AnnData | SpatialData,
    *,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = None,
    spatial_key: str = "spatial",
    connectivity_key: str | None = None,
    layer: str | None = None,
    missing: str | None = None,
    genes: Any = None,
    sd: bool = False,
    key_added: str = "spaformer",
    preset: str = "default",
    quality: str = "default",
    encoder: str = "auto",
    decoder: str = "auto",
    positional: str | Sequence[str] | None = "auto",
    variational: bool = False,
    masking: str | Sequence[str] | None = "auto",
    n_latent: int | None = None,
    max_epochs: int | None = None,
    settings: Any = None,
    graph: Any = "knn",
    n_neighbors: int = 6,
    radius: float | None = None,
    tile_size: int = 4000,
    device: str = "auto",
    devices: int = 1,
    timing: bool = True,
) -> CheckReport:
    """Look at data before they are imputed: what is in them, what will be done, and what it takes.

    Nothing is imputed, and ``adata`` is not changed. Counts in a file (``backed="r"``) are read in blocks.

    Parameters
    ----------
    adata
        The data.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    timing
        Estimate how long a run takes, by training on up to 1,024 of the cells for a moment; some seconds.
    library_key, spatial_key, connectivity_key, layer, missing, genes, sd, key_added
        As in :func:`spaformer_sc.tl.impute`.
    preset, quality, encoder, decoder, positional, variational, masking, n_latent, max_epochs, settings
        As in :func:`spaformer_sc.tl.impute`.
    graph, n_neighbors, radius, tile_size, device, devices
        As in :func:`spaformer_sc.tl.impute`.

    Returns
    -------
    A report: a table in a notebook, text with ``print``. ``.ok`` is False where ``sf.tl.impute`` refuses the data;
    ``.table`` is a data frame with a row for each finding: its ``level`` (``"ok"``; ``"note"``, good to know;
    ``"warning"``, the result may suffer; ``"error"``, refused), ``subject``, ``finding``, and ``advice`` where the
    finding does not say itself what to do. Errors are in the words of ``sf.tl.impute``.

    Raises
    ------
    TypeError, ValueError
        If ``adata`` is no AnnData, or an argument cannot be used with any data. Bad data are reported, not raised.

    Notes
    -----
    The time is that per cell of training, validation and prediction, measured in one thread, times the cells that pass
    through them in a run. It goes from a training that stops as early as it can to one that does not stop early, and
    leaves out what is done once (reading, graphs, scores, writing). It is of this computer, as busy as it is.

    Examples
    --------
    >>> sf.pp.check(adata, library_key="fov")
    """
    _checks.check_is_anndata(adata)
    for name, value in {"connectivity_key": connectivity_key, "layer": layer, "missing": missing}.items():
        if value is not None:
            _checks.check_name(name, value)
    _checks.check_name("spatial_key", spatial_key)
    if library_key is not None:
        _checks.check_library_columns(library_key)
    sd, timing = _checks.check_flag("sd", sd), _checks.check_flag("timing", timing)
    model = SpaFormer(
        library_key=library_key,
        spatial_key=spatial_key,
        connectivity_key=connectivity_key,
        layer=layer,
        missing=missing,
        preset=preset,
        quality=quality,
        positional=positional,
        encoder=encoder,
        decoder=decoder,
        variational=variational,
        masking=masking,
        n_latent=n_latent,
        max_epochs=max_epochs,
        settings=settings,
        graph=graph,
        n_neighbors=n_neighbors,
        radius=radius,
        tile_size=tile_size,
        device=device,
        devices=devices,
    )
    found = _Findings()
    title = f"{adata.n_obs:,} cells × {adata.n_vars:,} genes"
    with found.of("cells and genes"):
        _checks.check_adata(adata)
    if not (adata.n_obs and adata.n_vars and adata.obs.columns.is_unique):
        return found.report(title)
    with found.of("result", "note"):
        _checks.check_view(adata, copy=False)
    with found.of("result"):
        _checks.check_key_added(adata, key_added, slots=Keys(key_added).slots, mark="spaformer_sc")
    if adata.var_names.is_unique:
        with found.of("cells and genes"):
            _checks.check_genes(adata, genes)
    opened = _open(adata, model, found)
    if opened is not None:
        _say_what_happens(adata, model, opened, sd, timing, found)
    return found.report(title)


def _open(adata: AnnData, model: SpaFormer, found: _Findings) -> Opened | None:
    """Check and describe all that is read; None where something cannot be used."""
    from spaformer_sc.data._graph import given_graph

    keys = model.keys
    counts = codes = coordinates = mask = given = None
    with found.of("missing entries", advice="Look whether the layer is right; else leave these genes out."):
        mask = _checks.check_layer_of_missing(adata, keys.missing)
    with found.of("counts"):
        counts = as_counts(read_or_scan(adata, keys.layer), mask)
    if counts is not None:
        _describe_counts(adata, counts, mask, keys.layer, found)
    library = None
    with found.of("fields of view"):
        library = _checks.check_library_key(adata, keys.library_key)
        codes, names = field_codes(adata.obs, library)
        _describe_fovs(codes, names, library, found)
    with found.of("positions", advice="Look at the coordinates, and whether `spatial_key` names the right ones."):
        coordinates = _checks.check_coordinates(adata, keys.spatial_key, codes)
    if coordinates is not None and codes is not None:
        _describe_positions(adata, keys.spatial_key, coordinates, codes, library, found)
    if keys.connectivity_key is not None:
        with found.of("spatial graph", advice="Look whether the graph was made with the same fields of view."):
            weights = _checks.check_connectivities(adata, keys.connectivity_key)
            given = None if codes is None else given_graph(weights, codes)
    if found.errors or counts is None or coordinates is None or codes is None:
        return None
    return Opened(counts, mask, model._layout(coordinates, codes, names, given))


def _describe_counts(
    adata: AnnData, counts: Counts, mask: NDArray[np.bool_] | None, layer: str | None, found: _Findings
) -> None:
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    outside = _checks.lies_outside_memory(adata, layer)  # then missing entries are among the counts
    depth, n_entries = counts.per_cell, adata.n_obs * adata.n_vars
    n_entries -= 0 if mask is None or outside else int(mask.sum())
    if not counts.fractional:
        found.add("ok", "counts", f"`{where}` holds whole numbers, as raw counts are")
    low, middle, high = np.min(depth), np.median(depth), np.max(depth)
    zeros = 100 * (1 - counts.n_filled.sum() / max(n_entries, 1))
    found.add(
        "ok",
        "counts",
        f"a cell has {low:,.0f} to {high:,.0f} counts, {middle:,.0f} in the median; {zeros:.1f} % of entries are zero",
    )
    with found.of("counts", "note"):
        _checks.describe_empty(counts)
    if mask is not None:
        with found.of("missing entries"):
            _checks.check_some_left(int(counts.n_filled.sum()))
        share = 100 * mask.mean()
        found.add("ok", "missing entries", f"{share:.1f} % of entries are marked as not measured")
    if adata.n_obs < _checks.FEW_CELLS or depth.sum() < FEW_COUNTS:
        found.add(
            "warning",
            "counts",
            f"{adata.n_obs:,} cells with {depth.sum():,.0f} counts in all are little to learn from",
            "Add slides of the same kind, if there are any, and look at the held-out scores before you use the result.",
        )
    from spaformer_sc.training.reliability import LEAST_HELD

    rare = int(np.sum((counts.per_gene > 0) & (counts.per_gene * TEST_SHARE < LEAST_HELD)))
    if rare:
        found.add(
            "note",
            "counts",
            f"{rare:,} genes have counts, but fewer than {LEAST_HELD / TEST_SHARE:,.0f}: the twentieth that is held "
            "out will be too few to show that they are imputed well",
        )
    with found.of("cells and genes"):
        _checks.describe_controls(adata)


def _describe_fovs(codes: NDArray[np.int64], names: list[str], library: list[str] | None, found: _Findings) -> None:
    sizes = np.bincount(codes)
    if library is None:
        found.add("ok", "fields of view", "no `library_key`: all cells are one field of view")
        return
    least, most = sizes.min(), sizes.max()
    cells = (
        f"{least:,} to {most:,} cells, {np.median(sizes):,.0f} in the median" if least < most else f"{least:,} cells"
    )
    found.add("ok", "fields of view", f"{_number(len(sizes), 'field')} of view, of {cells}")
    small = np.flatnonzero(sizes < SMALL_FOV)
    if len(small):
        listed = _checks._listing((f"{names[code]} ({sizes[code]})" for code in small), 5)
        found.add(
            "note",
            "fields of view",
            f"{len(small)} of them have fewer than {SMALL_FOV} cells: {listed}; these have little around them to be "
            "imputed from",
        )


def _describe_positions(
    adata: AnnData,
    spatial_key: str,
    coordinates: NDArray[np.float64],
    codes: NDArray[np.int64],
    library: list[str] | None,
    found: _Findings,
) -> None:
    n_axes = coordinates.shape[1]
    span = " × ".join(f"{value:,.5g}" for value in np.ptp(coordinates, axis=0))
    found.add("ok", "positions", f"{n_axes} dimensions, spanning {span}; none is missing")
    frame = pd.DataFrame(coordinates).assign(field=codes)
    twice = int(frame.duplicated(keep=False).sum())
    many = twice > MANY * len(frame)
    if twice:
        found.add(
            "warning" if many else "note",
            "positions",
            f"{twice:,} cells lie exactly where another cell of their field of view lies",
            "Look whether cells occur twice, or whether `library_key` lacks a column." if many else "",
        )
    if library is not None and codes.max() > 0:
        text = (
            "fields of view lie on each other: positions start again in each, or on each slide. That is well, as "
            "neighbours are looked for within a field only"
            if _checks.lie_on_each_other(coordinates, codes)
            else "fields of view lie beside each other: positions are global"
        )
        found.add("ok", "positions", text)
    with found.of("positions"):
        _checks.check_images_apart(adata, spatial_key, coordinates, codes, library)


def _describe_graph(
    model: SpaFormer, fields: list[FieldOfView], summary: dict[str, Any], n_cells: int, found: _Findings
) -> float:
    """Describe the graph; the typical distance between neighbours."""
    distance, n_fovs, n_components = summary["typical_distance"], summary["n_fovs"], summary["n_components"]
    kind = "the given graph" if model.keys.connectivity_key else f"graph={model.graph!r}"
    found.add(
        "ok",
        "spatial graph",
        f"{kind}: {2 * summary['n_edges'] / n_cells:.1f} neighbours of a cell in the mean, {distance:.4g} apart in the "
        f"median; {_number(n_components, 'connected component')} in {_number(n_fovs, 'field')} of view",
    )
    # In a tile, neighbours of its own cells are in its margin.
    alone = sum(int(np.sum(~np.isin(np.flatnonzero(f.own), f.edge_index[0].numpy()))) for f in fields)
    if alone:
        advice = "Look whether `library_key` makes fields of view of single cells."
        if model.graph == "radius":
            advice = "Take a larger `radius`, or graph='knn'."
        found.add(
            "warning" if alone > MANY * n_cells else "note",
            "spatial graph",
            f"{alone:,} cells have no neighbour, so that they are imputed from their own counts",
            advice if alone > MANY * n_cells else "",
        )
    return float(distance)


def _describe_unit(coordinates: NDArray[np.float64], distance: float, found: _Findings) -> None:
    whole = "; all are whole numbers" if not (coordinates % 1).any() else ""
    low, high = IN_UM
    guess = (
        "as in µm, but the unit is not written anywhere"
        if low <= distance <= high
        else f"too {'far' if distance > high else 'close'} for µm; pixels or another unit"
    )
    found.add(
        "ok",
        "positions",
        f"neighbours are {distance:.4g} apart, {guess}{whole}. The unit matters to `radius` and `patch_size` only",
    )


def _say_what_happens(
    adata: AnnData, model: SpaFormer, opened: Opened, sd: bool, timing: bool, found: _Findings
) -> None:
    """Say which graphs, tiles and networks there will be, and what they take."""
    from spaformer_sc._duration import duration

    layout: Layout = replace(opened.layout, n_rings=0, encode=None)
    n_all = adata.n_obs
    device = None
    with found.of("device"):
        device = resolve_device(model.device)
        _checks.check_kind_of_devices(model.devices, device)
    with found.of("spatial graph", "note"):
        fields, summary, cells = model._choose(layout, opened.missing, most_fitted(adata.n_vars))
        n_fitted = n_all if cells is None else len(cells)
        n_in_graphs = n_all if cells is None else int(np.isin(layout.codes, np.unique(layout.codes[cells])).sum())
        distance = _describe_graph(model, fields, summary, n_in_graphs, found)
        _describe_unit(layout.coordinates, distance, found)
        model._warn_of_components(summary)
    with found.of("what happens"):
        _checks.check_enough_cells(model.devices, n_fitted)
    if found.errors or device is None:
        return
    large = np.flatnonzero(is_tiled(np.bincount(layout.codes), model.tile_size))
    if len(large):
        n_tiles = sum(
            len(tile(layout.coordinates[layout.codes == code], tile_size=model.tile_size, margin=0)) for code in large
        )
        found.add(
            "ok",
            "what happens",
            f"{_number(len(large), 'field')} of view of more than {1.5 * model.tile_size:,.0f} cells: cut into "
            f"{n_tiles} overlapping tiles, whose results are blended",
        )
    if cells is None:
        text = "the fit is to all cells"
    else:
        text = (
            f"the fit is to {n_fitted:,} of {n_all:,} cells, in {len(fields)} fields of view or tiles drawn at random; "
            "all are imputed"
        )
    s = model.settings
    found.add("ok", "what happens", f"{text}; networks that are averaged: {s.n_networks}")
    held = opened.counts.n_filled
    n_counts = int(held.sum() if cells is None else held[cells].sum())
    kept = 4 * n_all * adata.n_vars * (1 + sd)
    outside = _checks.lies_outside_memory(adata, model.keys.layer)
    with found.of("memory"):
        workers = Workers(device)
        need = model._state_memory(
            fields, (n_fitted, adata.n_vars), n_counts, opened.missing is not None, 0 if outside else kept, workers
        )
        free = available_memory()
        told = "" if free is None else f"; {free / 2**20:,.0f} MiB are free"
        more = f", with `output_path=`; without it {kept / 2**20:,.0f} MiB more" if outside else ""
        found.add("ok", "memory", f"about {need >> 20:,} MiB at the peak{more}{told}")
    if timing and model.devices == 1 and not found.errors:
        where = f"{device}, {_number(workers.n, 'thread')}" if device.type == "cpu" else str(device)
        with found.of("time", "note"):
            try:
                times = _spelled(*duration(model, opened, fields))
            except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
                found.add("note", "time", f"a trial on some of the cells gave no estimate ({error})")
            else:
                text = f"about {times} on {where}, depending on when training no longer helps"
                found.add("ok", "time", text)


def _spelled(least: float, most: float) -> str:
    """A range of times, in the unit that suits the longer."""
    units = (3600, "hours"), (60, "minutes"), (1, "seconds")
    size, unit = next((size, unit) for size, unit in units if most > 2 * size or size == 1)
    low, high = (f"{value / size:.{0 if value >= 2 * size else 1}f}" for value in (least, most))
    return f"{low} to {high} {unit}"


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
