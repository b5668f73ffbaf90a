"""Data larger than memory: counts read from files, results written FOV by FOV, unfinished runs that go on."""

from __future__ import annotations

import itertools
import logging
import shutil
import signal
import subprocess
import sys
import warnings
from collections import namedtuple

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc import _checks, _gather, _write, model
from spaformer_sc._gather import Block, InMemory, OnDisk
from spaformer_sc.data._fields import fields_of_view, on_their_own, some_images
from spaformer_sc.training import checkpoint, trainer
from tests.conftest import contents, plain, sha256

pytestmark = pytest.mark.filterwarnings("ignore:`library_key` is None")
QUICK = {"library_key": "fov", "quality": "fast", "max_epochs": 3, "progress": False}


@pytest.fixture
def path(tissue, tmp_path):
    """A file with counts of whole numbers and text in `obs`."""
    tissue.raw = tissue.copy()
    tissue.write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def backed(path, **arguments):
    """Impute a file's counts into the file beside it, and read that."""
    adata = ad.read_h5ad(path, backed="r")
    out = path.with_name("out.h5ad")
    try:
        sf.tl.impute(adata, **{**QUICK, "output_path": out, **arguments})
    finally:
        adata.file.close()
    return ad.read_h5ad(out)


def same(found, expected, close=()):
    """The same contents, to the last digit but for layers that need only be close."""
    ours, theirs = contents(found), contents(expected)
    for place in theirs:
        if place in close:
            name = place.removeprefix("layers/")
            np.testing.assert_allclose(found.layers[name], expected.layers[name], rtol=1e-6)
        elif place == "uns/spaformer":
            assert repr(plain(found.uns["spaformer"])) == repr(plain(expected.uns["spaformer"]))
        elif place != "raw":
            assert ours[place] == theirs[place], place


# --- the same result --------------------------------------------------------------------------------------------------


SLIDE = {"library_key": None, "tile_size": 50}


def with_missing(tissue):
    missing = np.zeros(tissue.shape, dtype=bool)
    missing[:70, 3:9] = True
    tissue.layers["not measured"] = missing


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("csr", {}),
        ("dense", {"output": "rate", "genes": ["EPCAM", "VIM"]}),
        ("csc", {"quality": "default", "max_epochs": 1}),
        ("csr", {**SLIDE, "sd": True, "zeros": "keep"}),
        ("csr", {"missing": "not measured", "output": "counts", "sd": True}),
        ("csr", {"decoder": "gaussian"}),
    ],
)
def test_the_file_holds_what_an_imputation_in_memory_gives(tissue, tmp_path, monkeypatch, form, arguments):
    monkeypatch.setattr(_checks, "_SCANNED", 1000)
    monkeypatch.setattr(_gather, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(_write, "BLOCK_BYTES", 5000)
    with_missing(tissue)
    tissue.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x.toarray()}[form](tissue.X)
    tissue.write_h5ad(tmp_path / "in.h5ad")
    given = ad.read_h5ad(tmp_path / "in.h5ad")
    sf.tl.impute(given, **{**QUICK, **arguments})
    given.write_h5ad(tmp_path / "expected.h5ad")
    expected = ad.read_h5ad(tmp_path / "expected.h5ad")
    (tmp_path / "expected.h5ad").unlink()
    # Deviations are computed in blocks of cells, with as many terms of a series as a block needs.
    same(backed(tmp_path / "in.h5ad", **arguments), expected, close=["layers/spaformer_sd"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_the_input_stays_as_it_is_and_all_of_it_arrives(path):
    adata = ad.read_h5ad(path, backed="r")
    adata.obs["mine"] = "added after reading"
    before, file = contents(adata), sha256(path)
    assert sf.tl.impute(adata, output_path=path.with_name("out.h5ad"), **QUICK) is None
    assert contents(adata) == before
    adata.file.close()
    assert sha256(path) == file
    found, given = ad.read_h5ad(path.with_name("out.h5ad")), ad.read_h5ad(path)
    assert (found.obs["mine"] == "added after reading").all()
    kept = contents(given)
    assert {place: contents(found)[place] for place in kept} == kept


def test_an_earlier_result_is_replaced(path):
    backed(path, sd=True)
    shutil.copy(path.with_name("out.h5ad"), path)
    found = backed(path, output="rate")
    assert found.uns["spaformer"]["params"]["output"] == "rate"
    assert "spaformer_sd" not in found.layers


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_lazy_counts_of_a_store(tissue, tmp_path, form):
    from anndata.experimental import read_elem_lazy

    if form == "dense":
        tissue.X = tissue.X.toarray()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2 data", UserWarning)
        tissue.write_zarr(tmp_path / "in.zarr")
    import zarr

    lazy = ad.AnnData(
        X=read_elem_lazy(zarr.open_group(tmp_path / "in.zarr")["X"]),
        obs=tissue.obs, var=tissue.var, obsm=dict(tissue.obsm),
    )  # fmt: skip
    sf.tl.impute(lazy, output_path=tmp_path / "out.zarr", **QUICK)
    assert "spaformer" not in lazy.layers
    sf.tl.impute(tissue, **QUICK)
    found = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_array_equal(found.layers["spaformer"], tissue.layers["spaformer"])
    assert (found.X != tissue.X).sum() == 0


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_bad_counts_anywhere_in_a_file_are_found_before_training(tissue, tmp_path, monkeypatch, no_training, value):
    monkeypatch.setattr(_checks, "_SCANNED", 1000)
    counts = tissue.X.toarray().astype(np.float32)
    counts[150, 7] = value
    tissue.X = sp.csr_matrix(counts)
    tissue.write_h5ad(tmp_path / "in.h5ad")
    where = f"in cell {tissue.obs_names[150]!r}, gene {tissue.var_names[7]!r}"
    with pytest.raises(ValueError, match=where):
        backed(tmp_path / "in.h5ad")
    assert [file.name for file in tmp_path.iterdir()] == ["in.h5ad"]


def test_log_values_in_a_file_are_refused(tissue, tmp_path, no_training):
    tissue.X = tissue.X.log1p()
    tissue.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(ValueError, match="looks log-transformed"):
        backed(tmp_path / "in.h5ad")


def test_too_little_space_is_said_before_training(path, monkeypatch, no_training):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"of free space, and .* are needed"):
        backed(path)
    assert [file.name for file in path.parent.iterdir()] == ["in.h5ad"]


# --- a fit to some of the cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, SLIDE])
@pytest.mark.parametrize("on_disk", [True, False])
def test_large_data_are_fitted_to_some_of_their_cells(path, monkeypatch, caplog, arguments, on_disk):
    monkeypatch.setattr(model, "FITTED_ENTRIES", 0)
    monkeypatch.setattr(model, "LEAST_FITTED", 60)
    caplog.set_level(logging.INFO)
    if on_disk:
        found = backed(path, **arguments)
    else:
        found = ad.read_h5ad(path)
        sf.tl.impute(found, **{**QUICK, **arguments})
    n_fitted = next(record.args[0] for record in caplog.records if "the model is fitted to" in record.msg)
    # So small a slide lies in the margins of few tiles.
    assert n_fitted <= found.n_obs if arguments else 60 <= n_fitted < found.n_obs
    assert np.isfinite(found.layers["spaformer"]).all()
    filled = np.asarray(found.X.sum(axis=1)).ravel() > 0
    assert (found.layers["spaformer"][filled].sum(axis=1) > 0).all()
    assert found.obs["spaformer_reliability"].notna().all()
    assert found.obs["spaformer_gain"].notna().sum() == found.n_obs
    assert found.var["spaformer_held_out"].sum() == pytest.approx(
        0.05 * n_fitted / found.n_obs * found.X.sum(), rel=0.4
    )


def test_fields_are_drawn_until_they_hold_enough_cells() -> None:
    sizes, tiled = np.array([10, 20, 30, 40]), np.zeros(4, dtype=bool)
    for seed in range(20):
        chosen = some_images(sizes, 45, tiled, None, np.random.default_rng(seed))
        assert (np.diff(chosen) > 0).all()
        assert sizes[chosen].sum() >= 45
        assert min(sizes[chosen].sum() - sizes[c] for c in chosen) < 45
    tiled[2] = True
    assert all(2 in some_images(sizes, 1, tiled, None, np.random.default_rng(seed)) for seed in range(9))


def test_every_gene_is_measured_in_a_field_that_is_drawn() -> None:
    measured = np.array([[True, False, False], [True, False, False], [False, True, False], [True, False, False]])
    for seed in range(20):
        chosen = some_images(np.full(4, 10), 1, np.zeros(4, dtype=bool), measured, np.random.default_rng(seed))
        np.testing.assert_array_equal(measured[chosen].any(axis=0), [True, True, False])


def test_tiles_on_their_own_are_a_data_set(shared_tissue) -> None:
    whole = sf.SpaFormer(tile_size=50, progress=False)
    layout = whole._open(shared_tissue, whole.keys).layout
    tiles, _ = fields_of_view(layout)
    assert len(tiles) >= 3
    chosen, summary = fields_of_view(layout, None, 0.3, np.random.default_rng(0))
    assert 1 <= len(chosen) < len(tiles)
    assert summary["n_tiles"] == len(chosen)
    fields, cells = on_their_own(chosen)
    weight, owned = np.zeros(len(cells)), np.zeros(len(cells))
    for field, old in zip(fields, chosen, strict=True):
        np.testing.assert_array_equal(cells[field.cells], old.cells)
        weight[field.cells] += field.weight
        owned[field.cells] += field.own
    np.testing.assert_allclose(weight, 1, atol=1e-6)
    assert (owned == 1).all()


# --- gathering --------------------------------------------------------------------------------------------------------


def test_both_gather_the_same_to_the_last_digit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_gather, "BLOCK_BYTES", 400)
    rng = np.random.default_rng(0)
    gathered = InMemory(30, 4, 2), OnDisk(tmp_path, 30, 4, 2)
    parts = [rng.permutation(30)[:17] for _ in range(4)] + [np.arange(30)]
    for number, cells in enumerate(parts):
        weight = rng.random(len(cells)).astype(np.float32)
        block = Block(*(rng.random(s).astype(np.float32) for s in ((len(cells), 4), (len(cells), 2), len(cells))), None)
        for each in gathered:
            each.add(number, cells, weight, block)
    memory, disk = gathered
    np.testing.assert_array_equal(disk.blend(slice(3, 28))[:, :4], memory.expression[3:28])
    np.testing.assert_array_equal(disk.embedding, memory.embedding)
    np.testing.assert_array_equal(disk.depth, memory.depth)
    again = OnDisk(tmp_path, 30, 4, 2)
    assert [again.has(number) for number in range(6)] == [True] * 5 + [False]
    np.testing.assert_array_equal(again.blend(slice(0, 30))[:, :4], memory.expression)


# --- unfinished runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch):
    """Keep the state of a training after every epoch."""
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)


POINTS = [
    ("spaformer_sc.training.trainer.batch_loss", 2),
    ("spaformer_sc.training.trainer.batch_loss", 5),
    ("spaformer_sc.training.trainer.batch_loss", 8),
    ("spaformer_sc.training.trainer.batch_loss", 11),
    ("spaformer_sc.training.checkpoint.torch.save", 4),
    ("spaformer_sc.training.checkpoint.Checkpoint.drop", 1),
    ("spaformer_sc.training.scoring.held_out_scores", 1),
    ("spaformer_sc._gather.OnDisk.add", 1),
    ("spaformer_sc._gather.OnDisk.add", 3),
    ("spaformer_sc._gather.np.savez", 2),
    ("spaformer_sc._gather.OnDisk.blend", 2),
    ("spaformer_sc._write._copy_counts", 1),
]
"""What is interrupted, and at which call."""
TWO = {"settings": {"n_networks": 2, "dropout": 0.1, "tokens_per_step": 60}, "max_epochs": 2}


@pytest.mark.parametrize(("place", "call"), POINTS)
def test_an_interrupted_run_goes_on_to_the_same_result(path, monkeypatch, often, place, call):
    expected = backed(path, **TWO)
    path.with_name("out.h5ad").unlink()
    calls = 0

    def interrupted(*positional, **named):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*positional, **named)

    with monkeypatch.context() as patch:
        module, _, name = place.rpartition(".")
        owner = resolved(module)
        original = getattr(owner, name)
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            backed(path, **TWO)
    assert not path.with_name("out.h5ad").exists()
    found = backed(path, **TWO, resume=True)
    same(found, expected)
    assert sorted(file.name for file in path.parent.iterdir()) == ["in.h5ad", "out.h5ad"]


ABREAST = {"settings": {"n_networks": 3, "tokens_per_step": 60}, "max_epochs": 2}


@pytest.mark.parametrize("call", [1, 7, 13])
def test_networks_that_train_at_the_same_time_go_on_too(path, monkeypatch, often, call):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected = backed(path, **ABREAST)
    original = trainer.batch_loss
    calls = itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batch_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backed(path, **ABREAST)
    same(backed(path, **ABREAST, resume=True), expected)
    torch.set_num_threads(before)


def resolved(name):
    """The module, class or imported module of a dotted name."""
    import importlib

    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ValueError(name)


KILLED = """
import os, signal, sys, anndata as ad, spaformer_sc as sf, torch
from spaformer_sc import _gather
from spaformer_sc.training import checkpoint, trainer
torch.set_num_threads(1)
checkpoint.INTERVAL = 0.0
calls, module, name, call = 0, *sys.argv[3:5], int(sys.argv[5])
owner = {"trainer": trainer, "gather": _gather.OnDisk}[module]
original = getattr(owner, name)
def killed(*positional, **named):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*positional, **named)
setattr(owner, name, killed)
sf.tl.impute(ad.read_h5ad(sys.argv[1], backed="r"), output_path=sys.argv[2], **%r)
"""


@pytest.mark.parametrize("place", [("trainer", "batch_loss", "7"), ("gather", "add", "2")])
def test_a_killed_process_leaves_what_another_goes_on_with(path, often, place):
    expected = backed(path, **TWO)
    out = path.with_name("out.h5ad")
    before = sha256(out)
    program = KILLED % ({**QUICK, **TWO},)
    ended = subprocess.run([sys.executable, "-c", program, str(path), str(out), *place], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sha256(out) == before
    trained = []
    original = trainer.batch_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch_loss", lambda *a: trained.append(1) or original(*a))
        found = backed(path, **TWO, resume=True)
    same(found, expected)
    n_steps = 2 * 2 * 3
    assert len(trained) < n_steps - 3 if place[0] == "trainer" else not trained


def test_a_run_in_memory_goes_on_too(path, monkeypatch, often):
    adata, out = ad.read_h5ad(path), path.with_name("out.h5ad")
    expected = sf.tl.impute(adata, copy=True, **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr("spaformer_sc.training.scoring.held_out_scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sf.tl.impute(adata, output_path=out, **QUICK)
    monkeypatch.setattr("spaformer_sc.training.trainer.batch_loss", lambda *_: 1 / 0)
    sf.tl.impute(adata, output_path=out, resume=True, **QUICK)
    same(adata, expected)
    assert sorted(file.name for file in path.parent.iterdir()) == ["in.h5ad", "out.h5ad"]


def stopped(path, monkeypatch):
    """Leave an unfinished run."""
    with monkeypatch.context() as patch:
        patch.setattr("spaformer_sc.training.scoring.held_out_scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backed(path)
    assert path.with_name("out.h5ad.partial").is_dir()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"n_neighbors": 5}, "n_neighbors"), ({"output": "rate"}, "output"), ({"random_state": 1}, "random_state")],
)
def test_other_choices_do_not_go_on_with_a_run(path, monkeypatch, change, named):
    stopped(path, monkeypatch)
    with pytest.raises(ValueError, match=f"holds a run that differs in {named};"):
        backed(path, resume=True, **change)
    assert path.with_name("out.h5ad.partial").is_dir()
    backed(path, **change)  # anew
    assert not path.with_name("out.h5ad.partial").exists()


def test_other_data_do_not_go_on_with_a_run(tissue, path, monkeypatch):
    stopped(path, monkeypatch)
    tissue.X.data[0] += 1
    tissue.write_h5ad(path)
    with pytest.raises(ValueError, match="holds a run that differs in data;"):
        backed(path, resume=True)


def test_another_graph_does_not_go_on_with_a_run(path, monkeypatch):
    adata = ad.read_h5ad(path)
    graph = sp.random(adata.n_obs, adata.n_obs, 0.05, "csr", random_state=0)
    adata.obsp["mine"] = ((graph + graph.T) != 0).astype(np.float32)
    adata.write_h5ad(path)
    monkeypatch.setitem(QUICK, "connectivity_key", "mine")
    stopped(path, monkeypatch)
    adata.obsp["mine"] = (adata.obsp["mine"] @ adata.obsp["mine"] != 0).astype(np.float32)
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="holds a run that differs in data;"):
        backed(path, resume=True)


def test_counts_with_the_same_sums_are_other_data(path, monkeypatch):
    stopped(path, monkeypatch)
    adata = ad.read_h5ad(path)
    counts = adata.X.toarray()
    counts[:2, :2] += np.array([[1, 0], [0, 1]])
    adata.X = sp.csr_matrix(counts)
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="holds a run that differs in data;"):
        backed(path, resume=True)
    shutil.rmtree(path.with_name("out.h5ad.partial"))
    stopped(path, monkeypatch)
    counts[:2, :2] += np.array([[-1, 1], [1, -1]])
    adata.X = sp.csr_matrix(counts)
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="holds a run that differs in data;"):
        backed(path, resume=True)


@pytest.mark.parametrize("damage", ["rows", "field"])
def test_a_lost_part_of_the_result_is_computed_again(path, monkeypatch, damage):
    expected = backed(path)
    with monkeypatch.context() as patch:
        patch.setattr(_write, "_copy_counts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backed(path)
    rows = path.with_name("out.h5ad.partial") / "rows"
    if damage == "rows":
        (rows / "rows.float32").write_bytes((rows / "rows.float32").read_bytes()[:30_000])
    else:
        (rows / "000001.npz").write_bytes((rows / "000001.npz").read_bytes()[:200])
    same(backed(path, resume=True), expected)


def test_a_path_with_a_slash_at_its_end(path):
    adata = ad.read_h5ad(path, backed="r")
    sf.tl.impute(adata, output_path=f"{path.with_name('out.zarr')}/", **QUICK)
    adata.file.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["in.h5ad", "out.zarr"]


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_raw_is_that_of_the_object(path, form):
    for change in ("deleted", "kept"):
        adata, out = ad.read_h5ad(path, backed="r"), path.with_name(f"out.{form}")
        if change == "deleted":
            del adata.raw
        sf.tl.impute(adata, output_path=out, **QUICK)
        adata.file.close()
        raw = (ad.read_h5ad if form == "h5ad" else ad.read_zarr)(out).raw
        assert (raw is None) == (change == "deleted")
        if change == "kept":
            assert (raw.X != ad.read_h5ad(path).raw.X).sum() == 0
            assert list(raw.var_names) == list(adata.var_names)


def test_a_copy_of_backed_counts_with_standard_deviations(path):
    adata = ad.read_h5ad(path, backed="r")
    copied = sf.tl.impute(adata, copy=True, sd=True, zeros="keep", **QUICK)
    expected = sf.tl.impute(ad.read_h5ad(path), copy=True, sd=True, zeros="keep", **QUICK)
    np.testing.assert_array_equal(copied.layers["spaformer_sd"], expected.layers["spaformer_sd"])
    assert adata.shape == copied.shape
    adata.file.close()


def test_a_folder_of_another_kind_is_left_alone(path, no_training):
    folder = path.with_name("out.h5ad.partial")
    folder.mkdir()
    (folder / "thesis.txt").write_text("the only copy")
    (folder / "run.json").write_text('{"speed": "10 km/h"}')
    with pytest.raises(ValueError, match="is in the way"):
        backed(path)
    assert (folder / "thesis.txt").read_text() == "the only copy"


def test_a_truncated_state_is_said_so(path, monkeypatch):
    stopped(path, monkeypatch)
    state = path.with_name("out.h5ad.partial") / "network_0.pt"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"network_0\.pt is damaged; pass resume=False"):
        backed(path, resume=True)
