"""What `sf.pp.check` says of data, good and bad."""

from __future__ import annotations

import logging
import re
import warnings
from xml.etree import ElementTree

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spaformer_sc as sf
from spaformer_sc import _checks, _duration, model
from spaformer_sc.pp import _check
from spaformer_sc.pp._report import CheckReport, Finding
from tests.conftest import furnish, untouched


def check(adata, **arguments):
    return sf.pp.check(adata, **{"library_key": "fov", "timing": False, **arguments})


def found(report, subject, level=None):
    """Findings on a subject, with their advice."""
    chosen = [f for f in report.findings if f.subject == subject and level in (None, f.level)]
    return "\n".join(f"{f.finding} {f.advice}" for f in chosen)


# --- the report -------------------------------------------------------------------------------------------------------


def test_good_data(tissue):
    report = check(tissue, timing=True)
    assert report.ok
    table = report.table
    assert list(table.columns) == ["level", "subject", "finding", "advice"]
    assert list(table["subject"].drop_duplicates()) == [
        *("counts", "fields of view", "positions", "spatial graph", "what happens", "memory", "time"),
    ]
    assert set(table["level"]) <= {"ok", "note", "warning"}
    depth = np.asarray(tissue.X.sum(axis=1)).ravel()
    zeros = 100 * (tissue.X.toarray() == 0).mean()
    counts = found(report, "counts")
    assert "whole numbers" in counts
    assert f"a cell has 0 to {depth.max():.0f} counts, {np.median(depth):.0f} in the median; {zeros:.1f} %" in counts
    assert f"{np.sum(depth == 0)} of 180 cells have no counts" in found(report, "counts", "note")
    assert "180 cells with" in found(report, "counts", "warning")
    assert "3 fields of view, of 60 cells" in found(report, "fields of view")
    assert "2 dimensions" in found(report, "positions")
    assert "3 fields of view" in found(report, "spatial graph")
    assert "the fit is to all cells; networks that are averaged: 5" in found(report, "what happens")
    assert re.match(r"about [\d.]+ to [\d.]+ (seconds|minutes|hours) on ", found(report, "time", "ok"))


def test_a_report_as_text_and_as_a_table_for_notebooks():
    report = CheckReport(
        "2 cells × 3 genes",
        (
            Finding("ok", "counts", "fine <b> & more"),
            Finding("warning", "counts", "not " * 40 + "good", "Do <this>."),
            Finding("error", "memory", "too little"),
        ),
    )
    assert not report.ok
    lines = repr(report).splitlines()
    assert str(report) == repr(report)
    assert lines[0] == "2 cells × 3 genes: cannot be imputed as it is (1 error, 1 warning)"
    assert lines[1].split(maxsplit=2) == ["ok", "counts", "fine <b> & more"]
    assert lines[2].split()[:2] == ["warning", "not"]  # the subject is not said again
    assert lines[-2].strip() == "→ Do <this>."
    assert lines[-1].split(maxsplit=2) == ["error", "memory", "too little"]
    assert max(map(len, lines)) <= 100
    page = report._repr_html_()
    tree = ElementTree.fromstring(page)  # whole, and with all that data contain escaped
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows[0] == ["ok", "counts", "fine <b> & more"]
    assert rows[1][2].endswith("→ Do <this>.")
    assert "script" not in page
    for text in tree.iter("td"):  # letters have the colour of the page, whatever that is
        assert "color:#" not in text.attrib["style"]


def test_nothing_is_changed(tissue, tmp_path):
    furnish(tissue)
    with untouched(tissue):
        check(tissue, timing=True)
        check(tissue[10:100], layer="other")
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    backed = ad.read_h5ad(tmp_path / "tissue.h5ad", backed="r")
    with untouched(backed):
        check(backed, timing=True)


def test_counts_in_a_file_are_read_in_blocks(tissue, tmp_path, monkeypatch):
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    in_memory = check(tissue)
    sizes = []

    def load(matrix):
        sizes.append(matrix.shape[0])
        return in_memory_as_before(matrix)

    in_memory_as_before = _checks._in_memory
    monkeypatch.setattr(_checks, "_in_memory", load)
    monkeypatch.setattr(_checks, "_SCANNED", 50 * tissue.n_vars)
    from_file = check(ad.read_h5ad(tmp_path / "tissue.h5ad", backed="r"))
    assert sizes.count(50) == 3  # blocks of counts
    assert max(size for size in sizes if size != tissue.n_obs) == 50  # positions are whole
    for subject in ("counts", "fields of view", "positions", "spatial graph", "what happens"):
        assert found(from_file, subject) == found(in_memory, subject)
    assert "with `output_path=`; without it" in found(from_file, "memory")


def test_data_that_are_opened_lazily(tissue, tmp_path):
    pytest.importorskip("xarray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tissue.write_zarr(tmp_path / "tissue.zarr")
        lazy = ad.experimental.read_lazy(tmp_path / "tissue.zarr")
        for key in ("fov", None):
            report, wanted = check(lazy, library_key=key), check(tissue, library_key=key)
            for subject in ("counts", "fields of view", "positions", "spatial graph", "what happens"):
                assert found(report, subject) == found(wanted, subject)


def test_messages_and_warnings_are_in_the_report_and_nowhere_else(tissue, caplog):
    tissue.obs_names = ["same"] * tissue.n_obs
    caplog.set_level(logging.DEBUG, "spaformer_sc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check(tissue, library_key=None)
    assert caplog.messages == []
    assert "1 cell names more than once" in found(report, "cells and genes", "warning")
    assert "Pass library_key='fov' if so" in found(report, "fields of view", "warning")
    logging.getLogger("spaformer_sc").warning("heard again")
    assert caplog.messages == ["heard again"]


# --- what impute refuses ----------------------------------------------------------------------------------------------


def normalised(adata):
    adata.X = sparse.csr_matrix(adata.X / np.maximum(adata.X.sum(axis=1), 1) * 100)


def not_a_number(adata):
    adata.X[3, 2] = np.nan


def same_genes(adata):
    adata.var_names = ["EPCAM"] * 2 + list(adata.var_names[2:])


def no_place(adata):
    adata.obsm["spatial"][5] = np.nan


def no_label(adata):
    adata.obs["fov"] = adata.obs["fov"].cat.remove_categories([adata.obs["fov"].iloc[0]])


def taken(adata):
    adata.layers["spaformer"] = np.ones(adata.shape)


def masked_where_counted(adata):
    adata.layers["mask"] = adata.X.toarray() > 0


def distances(adata):
    adata.obsp["spatial_distances"] = sparse.identity(adata.n_obs, format="csr")


def nothing(adata):
    pass


FAULTS = [
    (normalised, {}, "counts"),
    (not_a_number, {}, "counts"),
    (nothing, {"layer": "raw"}, "counts"),
    (same_genes, {}, "cells and genes"),
    (nothing, {"genes": ["EPCAM", "nonsense"]}, "cells and genes"),
    (no_place, {}, "positions"),
    (nothing, {"spatial_key": "xy"}, "positions"),
    (no_label, {}, "fields of view"),
    (nothing, {"library_key": "FOV"}, "fields of view"),
    (nothing, {"missing": "mask"}, "missing entries"),
    (masked_where_counted, {"missing": "mask"}, "missing entries"),
    (distances, {"connectivity_key": "spatial_distances"}, "spatial graph"),
    (nothing, {"connectivity_key": "graph"}, "spatial graph"),
    (taken, {}, "result"),
    (nothing, {"key_added": "a/b"}, "result"),
    (nothing, {"device": "quantum"}, "device"),
]


@pytest.mark.parametrize(("fault", "arguments", "subject"), FAULTS)
def test_what_impute_refuses_is_an_error_in_its_words(tissue, no_training, fault, arguments, subject):
    fault(tissue)
    report = check(tissue, **arguments)
    assert not report.ok
    with pytest.raises((KeyError, TypeError, ValueError)) as refused:
        sf.tl.impute(tissue, **{"library_key": "fov", **arguments})
    (error,) = [f for f in report.findings if f.level == "error"]
    assert (error.subject, error.finding) == (subject, refused.value.args[0])


def test_a_view_of_a_file_is_refused(tissue, tmp_path, no_training):
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    view = ad.read_h5ad(tmp_path / "tissue.h5ad", backed="r")[:100]
    with pytest.raises(ValueError) as refused:
        sf.tl.impute(view, library_key="fov")
    assert found(check(view), "result", "error").strip() == str(refused.value)


def test_all_errors_are_listed(tissue):
    normalised(tissue)
    same_genes(tissue)
    no_place(tissue)
    taken(tissue)
    report = check(tissue, library_key="FOV", missing="mask", connectivity_key="graph")
    errors = [f.subject for f in report.findings if f.level == "error"]
    assert errors == [
        *("cells and genes", "counts", "missing entries", "fields of view", "positions", "spatial graph", "result"),
    ]
    assert "7 errors" in repr(report)


@pytest.mark.parametrize("cells", [slice(0), slice(None)])
def test_no_cells_or_genes(tissue, cells):
    report = check(tissue[cells, :0].copy())
    assert [f.level for f in report.findings] == ["error"]
    assert "at least one of each is needed" in repr(report).replace("\n" + 27 * " ", " ")


def test_too_little_memory_is_an_error(tissue, monkeypatch, no_training):
    monkeypatch.setattr("spaformer_sc._memory.available_memory", lambda: 2**20)
    monkeypatch.setattr("spaformer_sc._memory.PACKAGES", 0)
    with pytest.raises(MemoryError) as refused:
        sf.tl.impute(tissue, library_key="fov", progress=False)
    report = check(tissue, timing=True)
    assert found(report, "memory", "error").strip() == str(refused.value)
    assert found(report, "time") == ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"library_key": 3}, TypeError, "`library_key=3` must be the name"),
        ({"spatial_key": None}, TypeError, "`spatial_key=None` must be one name"),
        ({"layer": 3}, TypeError, "`layer=3` must be one name"),
        ({"missing": True}, TypeError, "`missing=True` must be one name"),
        ({"timing": 1}, TypeError, "`timing=1` must be True or False"),
        ({"quality": "bets"}, ValueError, "Did you mean 'best'"),
        ({"libary_key": "fov"}, TypeError, "Did you mean 'library_key'"),
        ({"hops": 0}, TypeError, r"pass settings=\{'hops': 0\}"),
    ],
)
def test_wrong_arguments_are_raised(tissue, arguments, error, message):
    with pytest.raises(error, match=message):
        check(tissue, **arguments)


def test_what_is_no_anndata_is_raised(tissue):
    with pytest.raises(TypeError, match="AnnData"):
        sf.pp.check(tissue.X)


# --- what is worth knowing --------------------------------------------------------------------------------------------


def test_fractions_and_probes(tissue):
    tissue.X = tissue.X.tocsr().astype(np.float32)
    tissue.X.data[::3] += 0.37
    tissue.var_names = ["NegPrb3", "BLANK_0001", "NegControlProbe_00042", *tissue.var_names[3:]]
    report = check(tissue)
    assert "fractional values" in found(report, "counts", "warning")
    assert "whole numbers" not in found(report, "counts")
    probes = found(report, "cells and genes", "warning")
    assert "3 of 30 features are no genes by their name or type: NegPrb3, BLANK_0001, NegControlProbe_00042." in probes


@pytest.mark.parametrize("name", ["NEGR1", "BLNK", "SYSTEM1", "Neg1", "NELFA", "Ascl1"])
def test_genes_are_no_probes(name):
    assert not _checks._CONTROLS.match(name)


def test_genes_that_cannot_be_shown_to_be_good(tissue):
    counts = tissue.X.toarray()
    counts[:, :2] = 0
    counts[:50, 0] = 1
    tissue.X = sparse.csr_matrix(counts)
    total = np.asarray(tissue.X.sum(axis=0)).ravel()
    n = int(np.sum((total > 0) & (total < 200)))
    assert f"{n} genes have counts, but fewer than 200" in found(check(tissue), "counts", "note")
    assert "1 of 30 genes have no counts" in found(check(tissue), "counts", "note")


def test_missing_entries(tissue):
    tissue.layers["mask"] = np.zeros(tissue.shape, dtype=bool)
    tissue.layers["mask"][:60, :10] = True
    report = check(tissue, missing="mask")
    assert "11.1 % of entries" in found(report, "missing entries")
    left = tissue.X.toarray()
    left[:60, :10] = 0
    assert f"{100 * (left == 0)[~tissue.layers['mask']].mean():.1f} % of entries are zero" in found(report, "counts")


def test_missing_entries_of_counts_in_a_file(tissue, tmp_path):
    tissue.layers["mask"] = np.ones(tissue.shape, dtype=bool)
    tissue.layers["mask"][:60, :10] = False
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    report = check(ad.read_h5ad(tmp_path / "tissue.h5ad", backed="r"), missing="mask")
    assert f"{100 * (tissue.X.toarray() == 0).mean():.1f} % of entries are zero" in found(report, "counts")


def test_names_that_are_no_strings_are_one_error(tissue):
    tissue.var.index = range(tissue.n_vars)
    assert found(check(tissue), "cells and genes", "error").count("must be strings") == 1
    assert "expected string" not in str(check(tissue))


def local(adata):
    """Positions that start at 0 in every field of view."""
    positions = pd.DataFrame(adata.obsm["spatial"]).groupby(adata.obs["fov"].to_numpy())
    adata.obsm["spatial"] = (positions.transform(lambda column: column - column.min())).to_numpy()
    return adata


def test_positions_that_start_again(tissue):
    assert "lie beside each other" in found(check(tissue), "positions", "ok")
    assert found(check(tissue, library_key=None), "positions", "warning") == ""
    local(tissue)
    assert "start again in each" in found(check(tissue), "positions", "ok")
    refused = found(check(tissue, library_key=None), "positions", "error")
    assert "the 3 images that `adata.obs['fov']` tells apart lie on top of each other" in refused
    assert "Pass library_key='fov'" in refused

    tissue.obs["patient"] = "a"
    refused = found(check(tissue, library_key="patient"), "positions", "error")
    assert "Pass library_key=['patient', 'fov']" in refused
    assert check(tissue, library_key=["fov", "patient"]).ok
    assert found(check(tissue, library_key=["fov", "patient"]), "positions", "warning") == ""


def test_fields_that_repeat_across_slides(tissue):
    both = ad.concat({"a": tissue, "b": tissue}, label="slide", index_unique="-")
    report = check(both)
    assert "Pass library_key=['slide', 'fov']" in found(report, "fields of view", "warning")
    twice = found(report, "positions", "warning")
    assert "360 cells lie exactly where another cell of their field of view lies" in twice
    good = check(both, library_key=["slide", "fov"])
    assert found(good, "fields of view", "warning") + found(good, "positions", "warning") == ""
    assert "6 fields of view" in found(good, "fields of view")


def test_small_fields_and_cells_alone(tissue):
    some = tissue[np.r_[0:61, 120:180]].copy()
    report = check(some)
    name = some.obs["fov"].iloc[60]
    assert f"1 of them have fewer than 50 cells: {name} (1)" in found(report, "fields of view", "note")
    assert "1 cells have no neighbour" in found(report, "spatial graph", "note")
    report = check(tissue, graph="radius", radius=1e-6)
    assert "180 cells have no neighbour" in found(report, "spatial graph", "warning")
    assert "larger `radius`" in found(report, "spatial graph", "warning")
    assert "180 connected components" in found(report, "spatial graph", "ok")


@pytest.mark.parametrize(("factor", "said"), [(1, "as in µm"), (50, "too far for µm"), (0.01, "too close for µm")])
def test_units(tissue, factor, said):
    tissue.obsm["spatial"] *= factor
    assert said in found(check(tissue), "positions", "ok")
    tissue.obsm["spatial"] = np.rint(tissue.obsm["spatial"] * 1e4)
    assert "all are whole numbers" in found(check(tissue), "positions", "ok")


def test_cells_in_one_place(tissue):
    tissue.obsm["spatial"][:] = 1.0
    warned = found(check(tissue), "positions", "warning")
    assert "in one and the same place" in warned
    assert "whether `spatial_key` names the right ones" in warned


# --- what happens, and what it takes ----------------------------------------------------------------------------------


def test_tiles(tissue):
    report = check(tissue, library_key=None, tile_size=50)
    with pytest.warns(UserWarning, match="Pass library_key='fov'"):
        n_tiles = sf.pp.tile(tissue, tile_size=50, copy=True).obs["tile"].nunique()
    assert f"of more than 75 cells: cut into {n_tiles} overlapping tiles" in found(report, "what happens")


def test_large_data_are_fitted_to_some_of_them(tissue, monkeypatch, caplog):
    monkeypatch.setattr(model, "FITTED_ENTRIES", 0)
    monkeypatch.setattr(model, "LEAST_FITTED", 100)
    report = check(tissue, quality="fast")
    assert "the fit is to 120 of 180 cells, in 2 fields of view or tiles drawn at random" in found(
        report, "what happens"
    )
    assert "networks that are averaged: 1" in found(report, "what happens")


@pytest.mark.parametrize("arguments", [{}, {"sd": True}, {"missing": "mask"}, {"preset": "paper"}, {"tile_size": 50}])
def test_memory_is_what_impute_states(tissue, caplog, monkeypatch, arguments):
    tissue.layers["mask"] = np.zeros(tissue.shape, dtype=bool)
    tissue.layers["mask"][:60, :10] = True
    said = found(check(tissue, **arguments), "memory", "ok")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sf.SpaFormer, "_fit", stop)
    caplog.set_level(logging.INFO, "spaformer_sc")
    with pytest.raises(KeyboardInterrupt):
        sf.tl.impute(tissue, library_key="fov", progress=False, **arguments)
    (stated,) = [message for message in caplog.messages if message.startswith("memory: ")]
    assert said.split(" MiB")[0] == stated.removeprefix("memory: ").split(" MiB")[0]


def opened(tissue, **arguments):
    new = sf.SpaFormer(library_key="fov", device="cpu", **arguments)
    whole = new._open(tissue, new.keys)
    return new, whole, new._choose(whole.layout, whole.missing)[0]


def test_time_is_that_of_all_cells_that_pass_through(tissue, monkeypatch):
    # Seconds for each cell: training, validation, prediction.
    times = {"plain": (1, 0.1, 0.01), "wide": (2, 0.2, 0.02), "large": (4, 0.4, 0.03), "perceptron": (3, 0.3, 0.03)}
    monkeypatch.setattr(_duration, "_times", lambda trial, form, *_: times[form])
    settings = {"n_validations": 25, "patience": 4}
    least, most = _duration.duration(*opened(tissue, quality="fast", max_epochs=3, settings=settings))
    n = tissue.n_obs
    late = 3 * n * 2 + 25 * n * 0.2
    assert most == pytest.approx(late + 2 * n * 0.02)
    assert least == pytest.approx(late * 5 / 25 + 2 * n * 0.02)


def test_networks_are_trained_beside_each_other():
    assert _duration._abreast([], 2) == 0
    assert _duration._abreast([1, 2, 3], 1) == 6
    assert _duration._abreast([1, 2, 3], 2) == 3
    assert _duration._abreast([2, 2, 2, 2], 2) == 4
    assert _duration._abreast([1, 5], 8) == 5


@pytest.mark.parametrize(
    "arguments",
    [{}, {"preset": "paper"}, {"encoder": "gat", "positional": "laplacian"}, {"decoder": "gaussian"}],
)
def test_a_trial_leaves_the_model_as_it_is(tissue, arguments):
    new, whole, fields = opened(tissue, **arguments)
    before = repr(new), dict(vars(new))
    least, most = _duration.duration(new, whole, fields)
    assert 0 < least < most
    assert (repr(new), vars(new)) == before


def test_a_trial_takes_some_cells_of_the_largest_fields(tissue, monkeypatch):
    monkeypatch.setattr(_duration, "TRIED_CELLS", 80)
    _, whole, _ = opened(tissue)
    some = _duration._some(whole)
    assert some.counts.shape == (80, 30)
    assert sorted(np.bincount(some.layout.codes)) == [20, 60]


def test_a_trial_that_fails_is_noted(tissue, monkeypatch):
    def fail(*_):
        raise RuntimeError("training diverged")

    monkeypatch.setattr(_duration, "duration", fail)
    report = check(tissue, timing=True)
    assert report.ok
    assert "gave no estimate (training diverged)" in found(report, "time", "note")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        ((0.4, 1.2), "0.4 to 1.2 seconds"),
        ((30, 110), "30 to 110 seconds"),
        ((45, 600), "0.8 to 10 minutes"),
        ((3000, 14400), "0.8 to 4 hours"),
    ],
)
def test_times_in_words(seconds, shown):
    assert _check._spelled(*seconds) == shown
