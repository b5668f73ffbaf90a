"""A catalogue of bad and odd input: what is refused, in which words, and what is taken, with what result.

Everything refused is refused before any training, and nothing of the user's has changed then: neither the object, nor
files, nor the state of any global random generator.
"""

from __future__ import annotations

import errno
import os
import random
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc.training.checkpoint import Checkpoint
from tests.conftest import arrays_of, contents, furnish, sha256, untouched

SMALL = {"n_steps": 2, "dim": 8, "n_heads": 2, "n_layers": 1}
QUICK = {"library_key": "fov", "quality": "fast", "settings": SMALL, "n_latent": 4, "progress": False}


def impute(adata, **arguments):
    """`tl.impute` with `QUICK` arguments."""
    return sf.tl.impute(adata, **{**QUICK, **arguments})


@pytest.fixture(scope="module")
def plain():
    """Three FOVs of 30 cells, 20 genes, with something in every slot; not to be changed."""
    return furnish(sf.datasets.simulated_tissue(n_fovs=3, n_cells=30, n_genes=20))


@pytest.fixture
def adata(plain):
    """A copy of `plain`."""
    return plain.copy()


@pytest.fixture(scope="module")
def imputed(plain):
    """`plain` with a result, and counts that it has not seen."""
    result = impute(plain, copy=True)
    result.layers["held"] = plain.X.copy()
    return result


@pytest.fixture(scope="module")
def model(plain):
    """A model fitted to `plain`; not to be changed."""
    return sf.SpaFormer(**QUICK).fit(plain)


@pytest.fixture(autouse=True)
def global_state():
    """Check that global random generators and settings are left as they were."""

    def state():
        numpy = np.random.get_state()  # noqa: NPY002
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        settings = threads, dtype, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        drawn = numpy[1].tolist(), numpy[2:], random.getstate(), torch.get_rng_state().tolist()
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        return drawn, settings, np.geterr(), environment

    before = state()
    yield
    assert state() == before


# --- ways to spoil a tissue -------------------------------------------------------------------------------------------


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def counts(change):
    """Change ``X``."""

    def spoil(adata):
        adata.X = change(adata.X)

    return spoil


def one_count(value, dtype=np.float64):
    """Change a single entry of ``X``."""

    def change(matrix):
        matrix = matrix.toarray().astype(dtype)
        matrix[3, 4] = value
        return matrix

    return counts(change)


def places(change):
    """Change the coordinates."""

    def spoil(adata):
        adata.obsm["spatial"] = change(adata.obsm["spatial"])

    return spoil


def one_place(value):
    """Change the coordinates of a single cell."""
    return places(lambda xy: np.where(np.arange(len(xy))[:, None] == 3, value, xy))


def fovs(change):
    """Change the column of FOVs."""

    def spoil(adata):
        adata.obs["fov"] = change(adata.obs["fov"])

    return spoil


def layer(change, name="mine"):
    """Add a layer made of the object."""

    def spoil(adata):
        adata.layers[name] = change(adata)

    return spoil


def frame_of_places(adata, **columns):
    adata.obsm["spatial"] = pd.DataFrame(adata.obsm["spatial"], adata.obs_names, ["x", "y"]).assign(**columns)


def graph(change):
    """Add a graph made of the identity."""

    def spoil(adata):
        adata.obsp["mine"] = change(sp.identity(adata.n_obs, format="csr"))

    return spoil


def names(slot, values):
    """Replace the names of cells or genes."""

    def spoil(adata):
        if slot == "obs":
            del adata.obsm["frame"]  # which would have other names then
        getattr(adata, slot).index = pd.Index(values(getattr(adata, slot).index))

    return spoil


def normalised(adata):
    total = np.maximum(dense(adata.X).sum(axis=1, keepdims=True), 1)
    adata.X = dense(adata.X) / total * 100


def logarithms(adata):
    adata.layers["raw counts"] = adata.X.copy()
    normalised(adata)
    adata.X = np.log1p(adata.X)


def scaled(adata):
    logarithms(adata)
    adata.X = (adata.X - adata.X.mean(axis=0)) / (adata.X.std(axis=0) + 0.1)


def square_roots(adata):
    adata.X = np.sqrt(dense(adata.X))


def read_only(array):
    for part in (array.data, array.indices, array.indptr) if sp.issparse(array) else (array,):
        part.flags.writeable = False
    return array


def twice(columns):
    return lambda adata: setattr(adata, "obs", pd.concat([adata.obs, adata.obs[columns]], axis=1))


def no_positions(adata):
    del adata.obsm["spatial"]


def with_sd_of_another_name(adata):
    adata.uns["a"] = {"params": {"spaformer_sc": "1"}}
    adata.uns["a_sd"] = {"params": {"spaformer_sc": "1"}}
    adata.layers["a_sd"] = np.zeros(adata.shape, dtype=np.float32)


class SpatialData:
    """Named like the class of spatialdata."""


class MuData:
    """Named like the class of mudata."""


# --- what is refused --------------------------------------------------------------------------------------------------


def given(**arguments):
    """Call `tl.impute` with these arguments."""
    return lambda adata, _: impute(adata, **arguments)


def instead(thing):
    """Call `tl.impute` with something else than an AnnData."""
    return lambda adata, _: impute(thing(adata))


def fit(**arguments):
    return lambda adata, _: sf.SpaFormer(**QUICK).fit(adata, **arguments)


def predict(**arguments):
    return lambda adata, model: model.impute(adata, **arguments)


def tune(**arguments):
    return lambda adata, model: model.fine_tune(adata, **arguments)


def tile(**arguments):
    return lambda adata, _: sf.pp.tile(adata, **{"library_key": "fov", **arguments})


def encode(name, **arguments):
    return lambda adata, _: sf.pp.positional_encoding(adata, name, **{"library_key": "fov", **arguments})


NO = None
REFUSED = [  # name, how to spoil the tissue, call, error, words
    # the object
    (
        "DataFrame",
        NO,
        instead(lambda a: a.to_df()),
        TypeError,
        r"must be an AnnData, not DataFrame\. Make one: anndata\.AnnData",
    ),
    ("array", NO, instead(lambda a: dense(a.X)), TypeError, "`adata` must be an AnnData, not ndarray"),
    ("matrix", NO, instead(lambda a: a.X), TypeError, "`adata` must be an AnnData, not csr_matrix"),
    ("path", NO, instead(lambda _: "slide.h5ad"), TypeError, r"not str\. Read the file first: anndata\.read_h5ad"),
    ("Path", NO, instead(lambda _: Path("slide.h5ad")), TypeError, "Read the file first"),
    ("None", NO, instead(lambda _: None), TypeError, "`adata` must be an AnnData, not NoneType"),
    ("MuData", NO, instead(lambda _: MuData()), TypeError, r"Pass one modality of it: mdata\.mod"),
    ("SpatialData", NO, instead(lambda _: SpatialData()), TypeError, r"Pass the table in it: sdata\.tables"),
    ("no cells", NO, instead(lambda a: a[:0].copy()), ValueError, "has 0 cells and 20 genes; at least one of each"),
    ("no genes", NO, instead(lambda a: a[:, :0].copy()), ValueError, "has 90 cells and 0 genes"),
    (
        "gene names twice",
        names("var", lambda n: [n[1], *n[1:]]),
        given(),
        ValueError,
        "1 gene names more than once: COL",
    ),
    ("gene names as numbers", names("var", lambda n: range(len(n))), given(), TypeError, "20 of 20 are not: 0, 1"),
    (
        "a gene without name",
        names("var", lambda n: [None, *n[1:]]),
        given(),
        TypeError,
        r"1 of 20 are not.*astype\(str",
    ),
    (
        "columns twice",
        twice(["fov"]),
        given(),
        ValueError,
        r"`adata\.obs` holds columns more than once: fov\. Keep one",
    ),
    # counts
    (
        "no X",
        lambda a: delattr(a, "X"),
        given(),
        ValueError,
        r"`adata\.X` is None\. Pass `layer=`; there are: true_rate",
    ),
    (
        "negative",
        one_count(-1),
        given(),
        ValueError,
        r"1 negative values \(lowest -1, .* gene .*looks scaled or centred",
    ),
    ("NaN", one_count(np.nan), given(), ValueError, "1 values that are NaN or infinite, the first in cell 'fov1_4'"),
    ("infinite", one_count(np.inf), given(), ValueError, "NaN or infinite.*name the entries.*in `missing=`"),
    ("overflow", one_count(1e300), given(), ValueError, "1 values that are NaN or infinite"),
    ("a placeholder", one_count(2**60, np.int64), given(), ValueError, r"1 values above 1e\+09 \(largest 1\.153e\+18"),
    ("log values", logarithms, given(), ValueError, "log-transformed.*raw counts are needed.*pass layer='raw counts'"),
    ("normalised", normalised, given(), ValueError, r"looks normalised \(every cell has the same total\)"),
    ("scaled", scaled, given(), ValueError, "negative values.*pass layer='raw counts'"),
    ("square roots", square_roots, given(), ValueError, "looks like square roots.*`adata.raw` holds whole numbers"),
    ("all zero", counts(lambda x: x * 0), given(), ValueError, "has no counts: every entry is zero"),
    (
        "complex",
        counts(lambda x: dense(x).astype(complex)),
        given(),
        TypeError,
        "must hold numbers, but its dtype is comp",
    ),
    (
        "objects",
        counts(lambda x: dense(x).astype(object)),
        given(),
        TypeError,
        r"dtype is object;.*adata\.X = adata\.X\.astype",
    ),
    (
        "text",
        counts(lambda x: dense(x).astype(str)),
        given(),
        TypeError,
        "`adata.X` must hold numbers, but its dtype is <U",
    ),
    (
        "masked",
        counts(lambda x: np.ma.masked_array(dense(x), dense(x) > 2)),
        given(),
        ValueError,
        r"masked.*`\.filled\(0\)`",
    ),
    ("layer", NO, given(layer="True_rate"), KeyError, "there are: true_rate, other.*Did you mean 'true_rate'"),
    ("layer type", NO, given(layer=5), TypeError, "`layer=5` must be one name, a string, not int"),
    ("layers", NO, given(layer=["counts"]), TypeError, r"`layer=\['counts'\]` must be one name, a string, not list"),
    ("layer of rates", NO, given(layer="true_rate"), ValueError, r"`adata.layers\['true_rate'\]` looks normalised"),
    # entries that were not measured
    ("missing", NO, given(missing="mask"), KeyError, "`missing='mask'` is not in `adata.layers`; there are: true_rate"),
    ("missing type", NO, given(missing=True), TypeError, "`missing=True` must be one name"),
    (
        "missing counts",
        layer(lambda a: a.X),
        given(missing="mine"),
        ValueError,
        "layer of True .not measured.*or 1 and 0",
    ),
    (
        "missing text",
        layer(lambda a: np.full(a.shape, "no")),
        given(missing="mine"),
        ValueError,
        "1 and 0; found 'no'",
    ),
    ("missing NaN", layer(lambda a: np.full(a.shape, np.nan)), given(missing="mine"), ValueError, "found nan"),
    (
        "all missing",
        layer(lambda a: np.ones(a.shape, bool)),
        given(missing="mine"),
        ValueError,
        "every entry as not meas",
    ),
    (
        "missing inverted",
        layer(lambda a: dense(a.X) > 0),
        given(missing="mine"),
        ValueError,
        "is it the wrong way round",
    ),
    (
        "missing masked",
        layer(lambda a: np.ma.masked_array(np.zeros(a.shape), dense(a.X) > 2)),
        given(missing="mine"),
        ValueError,
        r"`missing='mine'` is a masked array; fill it",
    ),
    # coordinates
    (
        "no positions",
        no_positions,
        given(),
        KeyError,
        r"there are: frame\. .*adata\.obsm\['spatial'\] = adata\.obs\[\[",
    ),
    (
        "spatial_key",
        NO,
        given(spatial_key="Spatial"),
        KeyError,
        "`spatial_key='Spatial'` is not.*Did you mean 'spatial'",
    ),
    ("spatial_key columns", NO, given(spatial_key=["x", "y"]), TypeError, "`spatial_key=.*must be one name, a string"),
    ("spatial_key None", NO, given(spatial_key=None), TypeError, "`spatial_key=None` must be one name"),
    ("one axis", places(lambda xy: xy[:, :1]), given(), ValueError, r"two or three columns.*its shape is \(90, 1\)"),
    ("four axes", places(lambda xy: np.c_[xy, xy]), given(), ValueError, r"its shape is \(90, 4\)"),
    ("flat", places(lambda xy: xy[:, 0]), given(), ValueError, r"two or three columns"),
    (
        "NaN position",
        one_place(np.nan),
        given(),
        ValueError,
        "NaN or infinite for 1 of 90 cells: 'fov1_4'. Leave them out",
    ),
    ("infinite position", one_place(np.inf), given(), ValueError, r"for 1 of 90 cells.*np\.isfinite"),
    (
        "far position",
        one_place(3.4e38),
        given(),
        ValueError,
        r"beyond 1e\+15 for 1 of 90 cells: 'fov1_4'.*another unit",
    ),
    (
        "masked position",
        places(lambda xy: np.ma.masked_array(xy.astype(int), np.arange(180).reshape(90, 2) == 7)),
        given(),
        ValueError,
        "masked array without the positions of some cells; leave these cells out",
    ),
    (
        "positions as objects",
        places(lambda xy: xy.astype(object)),
        given(),
        TypeError,
        r"dtype is object;.*astype\(float",
    ),
    (
        "positions as text",
        places(lambda xy: xy.astype(str)),
        given(),
        TypeError,
        "must hold numbers, but its dtype is <U",
    ),
    (
        "frame with names",
        lambda a: frame_of_places(a, id="a"),
        given(),
        TypeError,
        "these columns do not: id. Leave them out",
    ),
    # fields of view
    ("library_key", NO, given(library_key="FOV"), KeyError, "categorical columns are: fov, .*Did you mean 'fov'"),
    ("library_key type", NO, given(library_key=5), TypeError, "must be the name of a column of `adata.obs` or a list"),
    ("library_key array", NO, given(library_key=np.array(["fov", "x"])), TypeError, "must be the name of a column"),
    ("library_key set", NO, given(library_key={"fov"}), TypeError, "must be the name of a column"),
    ("library_key empty", NO, given(library_key=[]), ValueError, "must name at least one column, and none twice"),
    ("library_key twice", NO, given(library_key=["fov", "fov"]), ValueError, "none twice"),
    (
        "no label",
        fovs(lambda f: f.where(np.arange(90) > 4)),
        given(),
        ValueError,
        r"5 of 90 cells have no label.*notna\(\)",
    ),
    ("NaN label", fovs(lambda f: f.cat.codes.replace(0, np.nan)), given(), ValueError, "30 of 90 cells have no label"),
    (
        "NA label",
        fovs(lambda f: f.astype("string").where(f != "fov2")),
        given(),
        ValueError,
        "30 of 90 cells have no label",
    ),
    ("measurements", fovs(lambda f: f.cat.codes + 0.5), given(), ValueError, r"holds measurements \(3 values of dtype"),
    # graphs
    (
        "graph name",
        NO,
        given(connectivity_key="connectivities"),
        KeyError,
        "there are: spatial_connectivities.*mean 'sp",
    ),
    ("graph type", NO, given(connectivity_key=["a"]), TypeError, "`connectivity_key=.*must be one name"),
    ("NaN weights", graph(lambda g: g * np.nan), given(connectivity_key="mine"), ValueError, "90 weights that are NaN"),
    ("negative weights", graph(lambda g: -g), given(connectivity_key="mine"), ValueError, "90 negative weights"),
    (
        "huge weights",
        graph(lambda g: g * 1e35),
        given(connectivity_key="mine"),
        ValueError,
        r"up to 1e\+35; divide them",
    ),
    (
        "graph",
        NO,
        given(graph="Delaunay"),
        ValueError,
        "choose one of 'knn', 'delaunay', 'radius'. Did you mean 'delaunay'",
    ),
    ("no radius", NO, given(graph="radius"), ValueError, "`graph='radius'` needs `radius=`, in the unit of the coord"),
    ("radius text", NO, given(graph="radius", radius="5"), TypeError, "`radius='5'` must be a number, not str"),
    ("radius zero", NO, given(graph="radius", radius=0), ValueError, "`radius=0` must be a finite number above 0"),
    ("radius unused", NO, given(radius="5"), ValueError, "`radius='5'` is used with `graph='radius'` only"),
    ("n_neighbors", NO, given(n_neighbors=0), ValueError, "`n_neighbors=0` must be at least 1"),
    ("n_neighbors float", NO, given(n_neighbors=6.0), TypeError, "`n_neighbors=6.0` must be a whole number, not float"),
    ("tile_size", NO, given(tile_size=10), ValueError, "`tile_size=10` must be at least 50"),
    ("tile_size None", NO, given(tile_size=None), TypeError, "`tile_size=None` must be a whole number"),
    # the model
    ("preset", NO, given(preset="papers"), ValueError, "one of 'default', 'paper'. Did you mean 'paper'"),
    ("quality", NO, given(quality="Fast"), ValueError, "one of 'fast', 'default', 'best'. Did you mean 'fast'"),
    (
        "encoder",
        NO,
        given(encoder=["performer"]),
        ValueError,
        r"`encoder=\['performer'\]` is not allowed; choose one of",
    ),
    ("encoder None", NO, given(encoder=None), ValueError, "`encoder=None` is not allowed; choose one of 'performer'"),
    ("decoder", NO, given(decoder="NB"), ValueError, "`decoder='NB'` is not allowed.*Did you mean 'nb'"),
    ("positional", NO, given(positional="laplace"), ValueError, "`positional='laplace'` is not.*mean 'laplacian'"),
    ("positional number", NO, given(positional=3), TypeError, "`positional=3` must be a name, a list of names or None"),
    ("positional set", NO, given(positional={"mlp"}), TypeError, "must be a name, a list of names or None"),
    ("masking", NO, given(masking="Thinning"), ValueError, "`masking='Thinning'` is not.*Did you mean 'thinning'"),
    ("masking number", NO, given(masking=0.5), TypeError, "`masking=0.5` must be a name, a list of names or None"),
    ("masking twice", NO, given(masking=["genes", "genes"]), ValueError, "names an entry twice; give each once"),
    ("variational", NO, given(variational=None), TypeError, "`variational=None` must be True or False"),
    ("n_latent", NO, given(n_latent="8"), TypeError, "`n_latent='8'` must be a whole number, not str"),
    ("n_latent bool", NO, given(n_latent=True), TypeError, "`n_latent=True` must be a whole number, not bool"),
    ("n_latent negative", NO, given(n_latent=-1), ValueError, "`n_latent=-1` must be at least 1"),
    ("max_epochs", NO, given(max_epochs=np.inf), TypeError, "`max_epochs=inf` must be a whole number"),
    ("both lengths", NO, given(max_epochs=1), ValueError, "both say how long to train; give one of them"),
    ("settings", NO, given(settings=[("hops", 0)]), TypeError, "must be a dictionary of names and values, not list"),
    ("settings name", NO, given(settings={"hop": 0}), ValueError, "has no 'hop'. Did you mean 'hops'.* It has: dim"),
    (
        "settings argument",
        NO,
        given(settings={"encoder": "mlp"}),
        ValueError,
        "give `encoder=` as an argument of its own",
    ),
    (
        "settings value",
        NO,
        given(settings={"dropout": np.nan}),
        ValueError,
        r"'dropout'\]=nan` must be a finite number, fr",
    ),
    (
        "settings choice",
        NO,
        given(settings={"hops": 3}),
        ValueError,
        r"\['hops'\]=3` is not allowed; choose one of 0, 1, 2",
    ),
    ("settings text", NO, given(settings={"learning_rate": "1e-3"}), TypeError, "must be a number, not str"),
    (
        "settings pair",
        NO,
        given(settings={"thinning": 0.5}),
        TypeError,
        r"must be a pair of numbers, such as \[0.3, 0.7\]",
    ),
    ("settings together", NO, given(settings={"dim": 100}), ValueError, "dim=100 must be a multiple of n_heads=8"),
    ("an inner choice", NO, given(hops=0), TypeError, r"`impute` has no argument `hops`: pass settings=\{'hops': 0\}"),
    (
        "an unknown argument",
        NO,
        given(n_neighbours=6),
        TypeError,
        "no argument `n_neighbours`. Did you mean 'n_neighbors'",
    ),
    (
        "a foreign argument",
        NO,
        given(batch_key="fov"),
        TypeError,
        "no argument `batch_key`.*It has: adata, table_key, library_key",
    ),
    ("by position", NO, lambda a, _: sf.tl.impute(a, "fov"), TypeError, "takes 1 positional argument"),
    ("device", NO, given(device="gpu"), ValueError, "`device='gpu'` cannot be used here.*'auto' and 'cpu' always can"),
    ("device None", NO, given(device=None), TypeError, "`device=None` must be a string, such as 'auto'"),
    ("a device of nothing", NO, given(device="meta"), ValueError, "`device='meta'` cannot be used here"),
    ("devices", NO, given(devices=0), ValueError, "`devices=0` must be at least 1"),
    ("devices text", NO, given(devices="2"), TypeError, "`devices='2'` must be a whole number"),
    ("random_state", NO, given(random_state=None), TypeError, "`random_state=None` must be a whole number"),
    (
        "a generator",
        NO,
        given(random_state=np.random.default_rng(0)),
        TypeError,
        "must be a whole number, not Generator",
    ),
    ("progress", NO, given(progress=0), TypeError, "`progress=0` must be True or False, not int"),
    # the result
    (
        "output",
        NO,
        given(output="log1p"),
        ValueError,
        "`output='log1p'` is not allowed; choose one of 'lognorm', 'counts'",
    ),
    ("target_sum", NO, given(target_sum=np.nan), ValueError, "`target_sum=nan` must be a finite number, from"),
    ("target_sum text", NO, given(target_sum="1e4"), TypeError, "`target_sum='1e4'` must be a number, not str"),
    ("target_sum huge", NO, given(target_sum=1e300), ValueError, r"`target_sum=1e\+300` must be a finite number, from"),
    ("zeros", NO, given(zeros=True), ValueError, "`zeros=True` is not allowed; choose one of 'impute', 'keep'"),
    ("sd", NO, given(sd="yes"), TypeError, "`sd='yes'` must be True or False, not str"),
    ("sd without", NO, given(sd=True, decoder="gaussian"), ValueError, "`sd=True` needs a distribution of counts"),
    ("copy", NO, given(copy=None), TypeError, "`copy=None` must be True or False"),
    ("genes", NO, given(genes=["EPCAM", "epcam"]), KeyError, "1 not in `adata.var_names`: epcam. Did you mean 'EPCAM'"),
    (
        "genes as numbers",
        NO,
        given(genes=[1, 2]),
        TypeError,
        r"not list of int64; names of columns are adata.var_names\[",
    ),
    ("genes in a list", NO, given(genes=[["EPCAM"]]), TypeError, "`genes` must be gene names or a boolean mask"),
    ("genes as bytes", NO, given(genes=b"EPCAM"), TypeError, "`genes` must be gene names or a boolean mask"),
    ("genes as a set", NO, given(genes={"EPCAM"}), TypeError, r"`genes` is a set, which has no order; pass a list"),
    ("no gene", NO, given(genes=[]), ValueError, "`genes` names no gene; pass None for all"),
    ("short mask", NO, given(genes=[True] * 3), ValueError, "`genes` is a mask of 3 values, but `adata` has 20 genes"),
    (
        "key_added empty",
        NO,
        given(key_added=" "),
        ValueError,
        "`key_added=' '` cannot be written to h5ad and zarr files",
    ),
    ("key_added slash", NO, given(key_added="a/b"), ValueError, "a name is not empty, .*has no '/'"),
    ("key_added null", NO, given(key_added="a\0b"), ValueError, "cannot be written.*null character"),
    ("key_added number", NO, given(key_added=5), TypeError, "`key_added=5` must be a string, not int"),
    (
        "key_added taken",
        NO,
        given(key_added="other"),
        ValueError,
        r"would overwrite adata\.layers\['other'\].*another name",
    ),
    ("key_added in uns", NO, given(key_added="spatial"), ValueError, r"would overwrite adata\.uns\['spatial'\]"),
    (
        "another result",
        with_sd_of_another_name,
        given(key_added="a"),
        ValueError,
        r"would overwrite adata\.layers\['a_sd'\]",
    ),
    (
        "output_path",
        NO,
        given(output_path="out.csv"),
        ValueError,
        r"`output_path='out.csv'` must end in .h5ad or .zarr",
    ),
    ("output_path number", NO, given(output_path=5), TypeError, "`output_path=5` must be a path, not int"),
    ("output_path null", NO, given(output_path="a\0.h5ad"), ValueError, "holds a null character"),
    ("output folder", NO, given(output_path="no/such/a.h5ad"), FileNotFoundError, "does not exist; create it first"),
    ("resume", NO, given(resume=True), ValueError, "`resume=True` needs `output_path=`"),
    ("resume text", NO, given(resume="yes"), TypeError, "`resume='yes'` must be True or False"),
    # the model object
    (
        "constructor",
        NO,
        lambda *_: sf.SpaFormer(hops=0),
        TypeError,
        r"`SpaFormer` has no argument `hops`: pass settings=",
    ),
    ("constructor's data", NO, lambda a, _: sf.SpaFormer(adata=a), TypeError, "`SpaFormer` has no argument `adata`"),
    ("fit", NO, lambda a, _: sf.SpaFormer().fit(a.X), TypeError, "`adata` must be an AnnData, not csr_matrix"),
    ("fit layer", NO, fit(layer="x"), KeyError, "`layer='x'` is not in `adata.layers`"),
    ("fit library_key", NO, fit(library_key=np.array(["fov", "x"])), TypeError, "must be the name of a column"),
    ("not fitted", NO, lambda a, _: sf.SpaFormer().impute(a), ValueError, r"not fitted; call `\.fit\(adata\)` first"),
    ("nothing to embed", NO, lambda a, _: sf.SpaFormer().embed(a), ValueError, "not fitted"),
    ("nothing to tune", NO, lambda a, _: sf.SpaFormer().fine_tune(a), ValueError, "not fitted"),
    (
        "nothing to save",
        NO,
        lambda *_: sf.SpaFormer().save("model"),
        ValueError,
        "not fitted; there is nothing to save",
    ),
    ("no model", NO, lambda *_: sf.SpaFormer.load("no such model"), FileNotFoundError, "holds no saved model"),
    ("predict frame", NO, lambda a, m: m.impute(a.to_df()), TypeError, "`adata` must be an AnnData, not DataFrame"),
    ("predict output", NO, predict(output="x"), ValueError, "`output='x'` is not allowed"),
    ("predict target_sum", NO, predict(target_sum=-1), ValueError, "`target_sum=-1` must be"),
    ("predict genes", NO, predict(genes="x"), KeyError, "`genes`: 1 not in `adata.var_names`: x"),
    ("predict library_key", NO, predict(library_key=np.array(["fov"])), TypeError, "must be the name of a column"),
    ("predict log values", logarithms, predict(), ValueError, "log-transformed"),
    (
        "other genes",
        NO,
        lambda a, m: m.impute(a[:, :3].copy()),
        ValueError,
        "lacks 17 of the 20 genes.*or fit a model on",
    ),
    ("effort zero", NO, tune(effort=0), ValueError, "`effort=0` would train nothing"),
    ("effort", NO, tune(effort=2), ValueError, "`effort=2` must be a finite number, from 0 to 1"),
    ("effort text", NO, tune(effort="all"), TypeError, "`effort='all'` must be a number, not str"),
    # preparing
    ("tile frame", NO, lambda a, _: sf.pp.tile(a.to_df()), TypeError, "`adata` must be an AnnData"),
    ("tile tile_size", NO, tile(tile_size=0), ValueError, "`tile_size=0` must be at least 1"),
    ("tile key_added", NO, tile(key_added="cell_type"), ValueError, r"would overwrite adata\.obs\['cell_type'\]"),
    ("tile key", NO, tile(key_added="fov"), ValueError, "also in `library_key`, which would be lost"),
    ("tile spatial_key", NO, tile(spatial_key=None), TypeError, "`spatial_key=None` must be one name"),
    ("encoding", NO, encode("laplace"), ValueError, "`name='laplace'` is not allowed.*Did you mean 'laplacian'"),
    ("encoding k", NO, encode("laplacian", k=2.5), TypeError, "`k=2.5` must be a whole number"),
    (
        "encoding patch",
        NO,
        encode("patch", patch_size=-1),
        ValueError,
        "`patch_size=-1` must be a finite number above 0",
    ),
    (
        "encoding key",
        NO,
        encode("linear", key_added="spatial"),
        ValueError,
        r"would overwrite adata\.obsm\['spatial'\]",
    ),
    ("encoding layer", NO, encode("conditional", layer="x"), KeyError, "`layer='x'` is not in"),
]


def refused(adata, spoil, call, error, words, model, folder):
    """Spoil an object, and check that a call is refused in these words and changes nothing."""
    if spoil is not None:
        spoil(adata)
    files = sha256(folder)
    with untouched(adata), pytest.raises(error, match=f"(?s){words}") as raised:
        call(adata, model)
    assert sha256(folder) == files
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("spoil", "call", "error", "words"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused(adata, model, no_training, tmp_path, monkeypatch, spoil, call, error, words):
    monkeypatch.chdir(tmp_path)
    refused(adata, spoil, call, error, words, model, tmp_path)


def ask(function, *arguments, **named):
    """Call a function of `tl` or `pl` with the object."""
    return lambda adata, _: function(adata, *arguments, **named)


def drop(slot, key):
    return lambda adata: getattr(adata, slot).pop(key)


def score(held_out="held", **arguments):
    return lambda adata, _: sf.tl.evaluate(adata, held_out, **arguments)


def score_layer(**arguments):
    return score(prediction="mine", scale="rate", **arguments)


TRUTH = {"prediction": "true_rate", "scale": "rate"}
REFUSED_OF_RESULTS = [
    (
        "interval frame",
        NO,
        lambda a, _: sf.tl.interval(a.to_df()),
        TypeError,
        "`adata` must be an AnnData, not DataFrame",
    ),
    (
        "no result",
        NO,
        ask(sf.tl.interval, key_added="x"),
        KeyError,
        r"no such result .*there are: spaformer\); run `sf.tl.imp",
    ),
    ("result of nothing", NO, ask(sf.tl.interval, key_added=None), TypeError, "`key_added=None` must be one name"),
    ("foreign record", lambda a: a.uns.update(spaformer=5), ask(sf.tl.interval), KeyError, r"no such result.*\(none\)"),
    (
        "layer gone",
        drop("layers", "spaformer"),
        ask(sf.tl.sample),
        KeyError,
        r"adata\.layers\['spaformer'\] of this result is g",
    ),
    ("depth gone", drop("obs", "spaformer_depth"), ask(sf.tl.detection), KeyError, r"adata\.obs\['spaformer_depth'\]"),
    ("dispersion gone", drop("var", "spaformer_dispersion"), ask(sf.tl.interval), KeyError, "run `sf.tl.impute` again"),
    (
        "counts gone",
        lambda a: delattr(a, "X"),
        ask(sf.tl.interval),
        KeyError,
        r"adata\.X, which .* is gone; put the counts",
    ),
    (
        "normalised since",
        normalised,
        ask(sf.tl.interval),
        ValueError,
        "no longer holds the counts.*keep a copy as a layer",
    ),
    ("level", NO, ask(sf.tl.interval, level=1), ValueError, "`level=1` must lie between 0 and 1, such as 0.9"),
    ("level in percent", NO, ask(sf.tl.interval, level=90), ValueError, "`level=90` must lie between 0 and 1"),
    ("of", NO, ask(sf.tl.interval, of="counts"), ValueError, "`of='counts'` is not allowed.*Did you mean 'count'"),
    ("interval gene", NO, ask(sf.tl.interval, "epcam"), KeyError, "epcam. Did you mean 'EPCAM'"),
    ("interval number", NO, ask(sf.tl.interval, 5), TypeError, "`genes` must be gene names or a boolean mask"),
    ("draws", NO, ask(sf.tl.sample, n=0), ValueError, "`n=0` must be at least 1"),
    ("too many draws", NO, ask(sf.tl.sample, n=10**10), ValueError, "draws of 90 cells.*ask for fewer draws"),
    ("capture", NO, ask(sf.tl.detection, capture=np.inf), ValueError, "`capture=inf` must be a finite number above 0"),
    ("plot of nothing", NO, ask(sf.pl.imputed, []), ValueError, "`genes` names no gene"),
    ("plot of a fov", NO, ask(sf.pl.imputed, "EPCAM", fov=5), KeyError, "`fov=5` is none of the fields of view: fov1"),
    ("plot size", NO, ask(sf.pl.imputed, "EPCAM", size="large"), TypeError, "`size='large'` must be a number"),
    (
        "plot without scores",
        drop("var", "spaformer_held_out"),
        ask(sf.pl.reliability),
        KeyError,
        "run `sf.tl.impute` again",
    ),
    ("plot frame", NO, lambda a, _: sf.pl.history(a.to_df()), TypeError, "`adata` must be an AnnData"),
    ("held_out", NO, score("Held"), KeyError, "`held_out='Held'` is not in `adata.layers`.*Did you mean 'held'"),
    ("held_out None", NO, score(None), TypeError, "`held_out=None` must be one name"),
    ("held_out seen", NO, score("held", layer="held", **TRUTH), ValueError, "counts that it has not seen"),
    ("no scale", NO, score(prediction="true_rate"), ValueError, "no result of `sf.tl.impute`; pass `scale=`"),
    ("scale known", NO, score(scale="rate"), ValueError, "`scale='rate'`: it is known of the result.*leave it out"),
    (
        "no prediction",
        NO,
        score(prediction="magic"),
        KeyError,
        "`prediction='magic'` is not in `adata.layers`; there are:",
    ),
    ("text", layer(lambda a: np.full(a.shape, "1")), score_layer(), TypeError, "`prediction='mine'` must hold numbers"),
    (
        "NaN",
        layer(lambda a: np.full(a.shape, np.nan)),
        score_layer(),
        ValueError,
        "NaN or infinite values in every gene",
    ),
    ("negative", layer(lambda a: np.full(a.shape, -1.0)), score_layer(), ValueError, "negative values .smallest: -1"),
    ("use_rep", NO, score(use_rep="X_Spaformer"), KeyError, "there are: .*X_spaformer. Did you mean 'X_spaformer'"),
    (
        "NaN in use_rep",
        lambda a: a.obsm.update(X_pca=np.full((90, 2), np.nan)),
        score(use_rep="X_pca"),
        ValueError,
        "`use_rep='X_pca'` holds 180 values that are NaN",
    ),
    ("scores over a result", NO, score(key_added="spaformer"), ValueError, "would overwrite"),
    (
        "attribution",
        NO,
        lambda a, _: sf.tl.attribution(a, a, "EPCAM", 0),
        TypeError,
        "`model` must be a fitted SpaFormer, not",
    ),
    ("attribution gene", NO, lambda a, m: sf.tl.attribution(a, m, "epcam", 0), KeyError, "Did you mean 'EPCAM'"),
    (
        "attribution cell",
        NO,
        lambda a, m: sf.tl.attribution(a, m, "VIM", 90),
        ValueError,
        "positions 90 are not from 0 to 89",
    ),
    ("reach", NO, lambda a, m: sf.tl.reach(a, m, n_cells=0), ValueError, "`n_cells=0` must be at least 1"),
]


@pytest.mark.parametrize(
    ("spoil", "call", "error", "words"), [c[1:] for c in REFUSED_OF_RESULTS], ids=[c[0] for c in REFUSED_OF_RESULTS]
)
def test_refused_of_results(imputed, model, no_training, tmp_path, spoil, call, error, words):
    refused(imputed.copy(), spoil, call, error, words, model, tmp_path)


# --- what is taken ----------------------------------------------------------------------------------------------------


def same(result, plain):
    """The result of the plain form of the same data, to the last bit."""
    np.testing.assert_array_equal(result.layers["spaformer"], plain.layers["spaformer"])
    np.testing.assert_array_equal(result.obsm["X_spaformer"], plain.obsm["X_spaformer"])
    pd.testing.assert_frame_equal(
        result.var.filter(like="spaformer_").reset_index(drop=True),
        plain.var.filter(like="spaformer_").reset_index(drop=True),
    )


def finite(result, plain):
    """Numbers everywhere, none of them negative, and not those of the plain data."""
    layer, latent = result.layers["spaformer"], result.obsm["X_spaformer"]
    assert np.isfinite(layer).all()
    assert np.isfinite(latent).all()
    assert layer.min() >= 0
    assert layer.max() > 0
    assert layer.shape != plain.shape or not np.array_equal(layer, plain.layers["spaformer"])


def zero_in_empty_cells(result, plain):
    finite(result, plain)
    empty = dense(result.X).sum(axis=1) == 0
    assert empty[3]
    assert not result.layers["spaformer"][empty].any()


def n_fields(n, then=finite):
    def check(result, plain):
        assert result.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == n
        then(result, plain)

    return check


def chosen_gene(result, plain):
    layer = result.layers["spaformer"]
    np.testing.assert_array_equal(layer[:, 1], plain.layers["spaformer"][:, 1])
    assert np.isnan(np.delete(layer, 1, axis=1)).all()


def indices64(matrix):
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return matrix


def dask_of(change):
    return lambda x: pytest.importorskip("dask.array").from_array(change(x), chunks=(40, -1))


def pyarrow(labels):
    pytest.importorskip("pyarrow")
    return labels.astype("string[pyarrow]")


def read_only_everywhere(adata):
    for place in (adata.X, adata.obsm["spatial"], adata.layers["other"], adata.layers["true_rate"]):
        read_only(place)


def codes(dtype):
    return fovs(lambda f: pd.array(f.cat.codes, dtype=dtype))


def sizes(*n):
    return fovs(lambda f: np.repeat([f"part{k}" for k in range(len(n))], n))


def without_fovs_as(name):
    return fovs(lambda f: f.cat.add_categories(name))


SCALARS = {
    "n_latent": np.int64(4),
    "n_neighbors": np.uint8(6),
    "tile_size": np.int32(4000),
    "random_state": np.int64(0),
    "devices": np.int8(1),
    "sd": np.False_,
    "progress": np.False_,
    "quality": np.str_("fast"),
    "output": np.str_("lognorm"),
    "library_key": np.str_("fov"),
    "encoder": np.str_("performer"),
    "key_added": np.str_("spaformer"),
    "settings": {name: np.int64(value) for name, value in SMALL.items()},
}
FRACTIONS = "holds fractional values .*taken as counts, as corrected counts"
ONE_PLACE = "in 3 of 3 fields of view all cells are in one and the same place, so their neighbours mean nothing"
TAKEN = [  # name, how to change the tissue, arguments, words that are logged, what comes out
    # counts in every form
    ("CSC", counts(sp.csc_matrix), {}, NO, same),
    ("array", counts(dense), {}, NO, same),
    ("Fortran order", counts(lambda x: np.asfortranarray(dense(x))), {}, NO, same),
    ("every other column", counts(lambda x: np.repeat(dense(x), 2, axis=1)[:, ::2]), {}, NO, same),
    ("sparse array", counts(sp.csr_array), {}, NO, same),
    ("indices of 64 bits", counts(indices64), {}, NO, same),
    ("float16", counts(lambda x: dense(x).astype(np.float16)), {}, NO, same),
    ("float64", counts(lambda x: x.astype(np.float64)), {}, NO, same),
    ("long double", counts(lambda x: x.astype(np.longdouble)), {}, NO, same),
    ("other byte order", counts(lambda x: dense(x).astype(">f4")), {}, NO, same),
    ("int64", counts(lambda x: x.astype(np.int64)), {}, NO, same),
    ("uint16", counts(lambda x: x.astype(np.uint16)), {}, NO, same),
    ("bool", counts(lambda x: x > 0), {}, NO, finite),
    ("dask", counts(dask_of(dense)), {}, NO, same),
    ("dask of CSR", counts(lambda x: dask_of(dense)(x).map_blocks(sp.csr_matrix)), {}, NO, same),
    ("read-only", read_only_everywhere, {}, NO, same),
    ("a layer as frame", layer(lambda a: a.to_df()), {"layer": "mine"}, NO, same),
    # counts out of the ordinary
    ("non-integer counts", counts(lambda x: dense(x) * np.where(np.arange(20) < 10, 0.7, 1)), {}, FRACTIONS, finite),
    ("a huge count", one_count(1e9), {}, NO, finite),
    ("all counts huge", counts(lambda x: x * 1e6), {}, NO, finite),
    (
        "a cell all zero",
        counts(lambda x: dense(x) * (np.arange(90) != 3)[:, None]),
        {},
        "cells have no c",
        zero_in_empty_cells,
    ),
    ("a gene all zero", counts(lambda x: dense(x) * (np.arange(20) != 5)), {}, "1 of 20 genes have no counts", finite),
    (
        "a FOV all zero",
        counts(lambda x: dense(x) * (np.arange(90) > 29)[:, None]),
        {},
        "cells have no c",
        zero_in_empty_cells,
    ),
    ("nothing missing", layer(lambda a: np.zeros(a.shape, bool)), {"missing": "mine"}, NO, finite),
    # names
    ("cell names twice", names("obs", lambda n: [n[1], *n[1:]]), {}, "1 cell names more than once: fov1_2", same),
    ("cells as numbers", names("obs", lambda n: range(len(n))), {}, NO, same),
    ("genes with a slash", names("var", lambda n: ["a/b", *n[1:]]), {}, NO, same),
    # fields of view
    ("unused categories", without_fovs_as("another"), {}, NO, n_fields(3, same)),
    ("integer FOVs", codes("int64"), {}, NO, n_fields(3, same)),
    ("float FOVs", codes("float64"), {}, NO, n_fields(3, same)),
    ("nullable FOVs", codes("Int64"), {}, NO, n_fields(3, same)),
    ("text FOVs", fovs(lambda f: f.astype(str)), {}, NO, n_fields(3, same)),
    ("string FOVs", fovs(lambda f: f.astype("string")), {}, NO, n_fields(3, same)),
    ("pyarrow FOVs", fovs(pyarrow), {}, NO, n_fields(3, same)),
    ("boolean FOVs", fovs(lambda f: f == "fov1"), {}, NO, n_fields(2)),
    ("nullable boolean FOVs", fovs(lambda f: (f == "fov1").astype("boolean")), {}, NO, n_fields(2)),
    (
        "a label written as text",
        fovs(lambda f: f.astype(str).replace("fov1", "nan")),
        {},
        "the label of 30 cells is",
        n_fields(3),
    ),
    ("FOVs of one and two cells", sizes(1, 2, 87), {}, NO, n_fields(3)),
    ("tuple of columns", NO, {"library_key": ("fov",)}, NO, same),
    # coordinates
    ("positions as frame", frame_of_places, {}, NO, same),
    ("sparse positions", places(sp.csr_matrix), {}, NO, same),
    ("positions masked nowhere", places(np.ma.masked_array), {}, NO, same),
    ("integer positions", places(lambda xy: np.rint(xy).astype(int)), {}, NO, finite),
    ("nanometres", places(lambda xy: xy * 2.0**20), {}, NO, same),
    ("kilometres", places(lambda xy: xy * 2.0**-30), {}, NO, same),
    ("units that differ", places(lambda xy: xy * np.repeat([1, 2.0**10, 2.0**-10], 30)[:, None]), {}, NO, same),
    ("a cell far away", one_place(1e9), {}, NO, finite),
    ("a flat third axis", places(lambda xy: np.c_[xy, np.ones(90)]), {}, NO, same),
    ("a third axis", places(lambda xy: np.c_[xy, 10 * np.arange(90) % 7]), {}, NO, finite),
    ("on a line", places(lambda xy: np.c_[np.arange(90.0), np.zeros(90)]), {}, NO, finite),
    (
        "on a line, Delaunay",
        places(lambda xy: np.c_[np.arange(90.0), np.zeros(90)]),
        {"graph": "delaunay"},
        "no Delaunay tri",
        finite,
    ),
    ("in one place", places(np.ones_like), {"positional": ["laplacian", "fourier"]}, ONE_PLACE, finite),
    ("more neighbours than cells", NO, {"n_neighbors": 10**6}, NO, finite),
    ("no edges", graph(lambda g: g * 0), {"connectivity_key": "mine"}, "no edges: every cell is by itself", finite),
    # arguments
    ("numpy's scalars", NO, SCALARS, NO, same),
    ("a large seed", NO, {"random_state": 2**70}, NO, finite),
    ("a device of torch", NO, {"device": torch.device("cpu")}, NO, same),
    ("a mask of genes", NO, {"genes": pd.array([False, True] + [False] * 18, dtype="boolean")}, NO, chosen_gene),
]
#: What is said of the plain tissue too, which is far too small to learn from.
USUAL = re.compile("cells have no counts: their expression|was not shown to be better|too few transcripts or cells to")


@pytest.mark.parametrize(("spoil", "arguments", "words", "check"), [c[1:] for c in TAKEN], ids=[c[0] for c in TAKEN])
def test_taken(adata, imputed, caplog, spoil, arguments, words, check):
    if spoil is not None:
        spoil(adata)
    before, arrays = contents(adata), arrays_of(adata)
    assert impute(adata, **arguments) is None
    said = [record.getMessage() for record in caplog.records]
    if words is None:
        assert not [line for line in said if not USUAL.search(line)]
    else:
        assert sum(bool(re.search(words, line)) for line in said) >= 1
    after = contents(adata)
    assert {place: after[place] for place in before} == before
    assert all(arrays_of(adata)[place] is array for place, array in arrays.items())
    check(adata, imputed)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ((slice(20, 21), slice(None)), "too few transcripts or cells to hold some out"),
        ((slice(None), slice(1, 2)), "too few transcripts or cells to hold some out|not shown to be better"),
        ((slice(20, 22), slice(0, 2)), "too few transcripts or cells to hold some out"),
    ],
    ids=["one cell", "one gene", "two of each"],
)
def test_hardly_any_data(adata, plain, caplog, part, words):
    small = adata[part].copy()
    small.X = sp.csr_matrix(dense(small.X) + 1)
    impute(small)
    assert re.search(words, caplog.text)
    finite(small, plain)


def test_coo_is_refused_by_anndata_or_gives_the_same(adata, imputed):
    before = contents(adata)
    try:
        adata.X = adata.X.tocoo()
    except ValueError:
        assert contents(adata) == before
        return
    impute(adata)
    same(adata, imputed)


def test_a_view(plain, imputed):
    view = plain[:, :]
    with untouched(plain):
        impute(view)
    assert not view.is_view
    same(view, imputed)


def test_a_refused_view_stays_a_view(adata, no_training):
    normalised(adata)
    view = adata[10:80, 3:]
    with untouched(adata), untouched(view), pytest.raises(ValueError, match="normalised"):
        impute(view)
    assert view.is_view


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [sp.csr_matrix, dense], ids=["sparse", "dense"])
def test_backed_read_only(adata, imputed, tmp_path, form):
    adata.X = form(adata.X)
    adata.write_h5ad(tmp_path / "slide.h5ad")
    before = sha256(tmp_path)
    backed = ad.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    impute(backed)
    same(backed, imputed)
    assert backed.isbacked
    backed.file.close()
    assert sha256(tmp_path) == before


@pytest.mark.parametrize(("spoil", "words"), [(logarithms, "log-transformed"), (one_place(np.nan), "NaN or infinite")])
def test_bad_data_in_a_file(adata, no_training, tmp_path, spoil, words):
    spoil(adata)
    adata.write_h5ad(tmp_path / "slide.h5ad")
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "zarr.json").write_text("an older result")
    before = sha256(tmp_path)
    backed = ad.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    with untouched(backed), pytest.raises(ValueError, match=words):
        impute(backed, output_path=tmp_path / "out.zarr")
    backed.file.close()
    assert sha256(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["out.zarr", "slide.h5ad"]


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")
NOT_ALLOWED = PermissionError(errno.EACCES, "Permission denied")
FAULTS = [  # name, what fails, how, words
    ("interrupt", (torch.optim.AdamW, "step"), KeyboardInterrupt("in the middle"), "in the middle"),
    ("memory", (torch.optim.AdamW, "step"), MemoryError("no more"), "no more"),
    ("full disk at a state", (Checkpoint, "save"), FULL, "No space left on device"),
    ("read-only folder", (Path, "mkdir"), NOT_ALLOWED, "Permission denied"),
]


@pytest.mark.parametrize(("place", "error", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_fault_on_the_way(adata, tmp_path, monkeypatch, place, error, words):
    path = tmp_path / "out.h5ad"
    path.write_bytes(b"an older result")
    monkeypatch.setattr("spaformer_sc.training.checkpoint.INTERVAL", 0.0)
    with untouched(adata), monkeypatch.context() as patch:
        patch.setattr(*place, raising(error))
        with pytest.raises(type(error), match=words):
            impute(adata, output_path=path)
    assert path.read_bytes() == b"an older result"
    assert {*os.listdir(tmp_path)} <= {"out.h5ad", "out.h5ad.partial"}
    impute(adata, output_path=path, resume=True)
    assert "spaformer" in ad.read_h5ad(path).layers
    assert os.listdir(tmp_path) == ["out.h5ad"]


@pytest.mark.parametrize("method", ["write_h5ad", "write_zarr"])
def test_no_space_for_the_output(adata, imputed, tmp_path, monkeypatch, caplog, method):
    path = tmp_path / f"out.{method.removeprefix('write_')}"
    before = contents(adata)
    with monkeypatch.context() as patch:
        patch.setattr(ad.AnnData, method, raising(FULL))
        with pytest.raises(OSError, match="No space left on device"):
            impute(adata, output_path=path)
    assert os.listdir(tmp_path) == [f"{path.name}.partial"]
    assert "resume=True goes on from there" in caplog.text
    after = contents(adata)
    assert {place: after[place] for place in before} == before
    same(adata, imputed)


def test_too_little_space_is_said_first(adata, no_training, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "slide.h5ad")
    backed = ad.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with (
        untouched(backed),
        pytest.raises(OSError, match=r"0\.0 GiB of free space.*give an `output_path` on another disk"),
    ):
        impute(backed, output_path=tmp_path / "out.h5ad")
    backed.file.close()
    assert os.listdir(tmp_path) == ["slide.h5ad"]


def test_a_folder_that_is_a_file_or_cannot_be_written_to(adata, no_training, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with untouched(adata), pytest.raises(FileNotFoundError, match="file does not exist; create it first"):
        impute(adata, output_path=tmp_path / "file" / "out.h5ad")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with untouched(adata), pytest.raises(PermissionError, match=r"`output_path=.* cannot be written to"):
        impute(adata, output_path=tmp_path / "out.h5ad")
    assert os.listdir(tmp_path) == ["file"]


def test_without_the_package_for_several_devices(adata, no_training, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with untouched(adata), pytest.raises(ImportError, match=r"`devices=2` needs Lightning: pip install '.*distributed"):
        impute(adata, devices=2)


def test_an_earlier_result_survives_a_refused_call(imputed, no_training):
    with untouched(imputed), pytest.raises(ValueError, match="looks normalised"):
        impute(imputed, layer="true_rate")
