"""Checks of user input: what passes is read right and left alone, what does not is named and explained."""

from __future__ import annotations

import hashlib
import itertools
import logging
import pickle
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spaformer_sc import _checks as checks
from spaformer_sc.data._counts import in_memory
from spaformer_sc.data._labels import field_codes, fov_like_columns, suggested_library_key

FORMS = [np.array, np.asfortranarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array]
DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def fingerprint(adata):
    """A hash of everything in an AnnData, bytes and types."""

    def describe(value):
        if sparse.issparse(value):
            return (
                type(value).__name__,
                value.shape,
                [describe(getattr(value, k)) for k in ("data", "indices", "indptr")],
            )
        if isinstance(value, np.ma.MaskedArray):
            return ("masked", describe(value.filled(0)), describe(np.ma.getmaskarray(value)))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return ("array", str(value.dtype), value.shape, value.tobytes())
        if isinstance(value, pd.DataFrame):
            return (
                "frame",
                [(k, str(value[k].dtype), value[k].astype(str).tolist()) for k in value],
                list(value.index),
            )
        if isinstance(value, dict) or hasattr(value, "items"):
            return {k: describe(v) for k, v in value.items()}
        return (type(value).__name__, repr(value))

    parts = [adata.X, adata.obs, adata.var, adata.layers, adata.obsm, adata.obsp, adata.varm, adata.uns]
    raw = None if adata.raw is None else adata.raw.X
    return hashlib.sha256(pickle.dumps([describe(part) for part in [*parts, raw]])).hexdigest()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def counts(rng):
    """60 cells × 30 genes of whole numbers; the totals differ from cell to cell."""
    return rng.poisson(rng.gamma(1.0, 1.0, 30) * rng.uniform(1, 6, (60, 1))).astype(np.float32)


@pytest.fixture
def adata(counts, rng):
    obs = pd.DataFrame(
        {
            "fov": pd.Categorical(np.repeat(["1", "2", "3"], 20)),
            "area": rng.random(60),
            "cell_type": pd.Categorical(rng.choice(["T", "B"], 60)),
        },
        index=[f"cell{i}" for i in range(60)],
    )
    var = pd.DataFrame({"highly_variable": np.arange(30) % 3 == 0}, index=[f"Gene{j}" for j in range(30)])
    return ad.AnnData(counts, obs=obs, var=var, obsm={"spatial": rng.random((60, 2))})


def with_x(adata, x, **layers):
    return ad.AnnData(x, obs=adata.obs, var=adata.var, layers=layers)


# --- generic helpers --------------------------------------------------------------------------------------------------


def test_choice():
    checks.check_choice("output", "counts", ("counts", "rate", None))
    checks.check_choice("output", None, ("counts", "rate", None))
    with pytest.raises(
        ValueError, match=r"`output='count'` is not allowed; choose one of 'counts', 'rate'. Did you mean"
    ):
        checks.check_choice("output", "count", ("counts", "rate"))
    for value in (1, True, ["counts"], np.array([1, 2])):
        with pytest.raises(ValueError, match="not allowed"):
            checks.check_choice("output", value, ("counts", 2, False))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integer(value):
    result = checks.check_integer("k", value)
    assert result == 3
    assert type(result) is int


@pytest.mark.parametrize(
    ("check", "value", "error"),
    [
        (checks.check_integer, 0, ValueError),
        (checks.check_integer, 3.0, TypeError),
        (checks.check_integer, True, TypeError),
        (checks.check_integer, "3", TypeError),
        (checks.check_positive, 0, ValueError),
        (checks.check_positive, -2.5, ValueError),
        (checks.check_positive, np.inf, ValueError),
        (checks.check_positive, np.nan, ValueError),
        (checks.check_positive, None, TypeError),
        (checks.check_positive, False, TypeError),
        (checks.check_flag, 1, TypeError),
        (checks.check_flag, "yes", TypeError),
    ],
)
def test_numbers_refused(check, value, error):
    with pytest.raises(error, match="`share="):
        check("share", value)


def test_numbers_passed():
    assert checks.check_integer("k", 0, minimum=0) == 0
    assert checks.check_positive("radius", np.float32(2.5)) == 2.5
    assert checks.check_positive("radius", 0, allow_zero=True) == 0
    assert checks.check_flag("copy", np.True_) is True


# --- the AnnData ------------------------------------------------------------------------------------------------------


def test_adata_passes(adata, caplog):
    before = fingerprint(adata)
    checks.check_adata(adata)
    checks.check_adata(adata[:10, :5])
    assert fingerprint(adata) == before
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ("data.h5ad", "not str. Read the file first"),
        (Path("data.h5ad"), "Read the file first"),
        (np.ones((2, 2)), "not ndarray"),
        (type("SpatialData", (), {})(), r"sdata.tables\['table'\]"),
        (type("MuData", (), {})(), r"mdata.mod\['rna'\]"),
    ],
)
def test_not_an_anndata(thing, message):
    with pytest.raises(TypeError, match=message):
        checks.check_adata(thing)


def test_no_cells_or_genes(adata):
    with pytest.raises(ValueError, match="0 cells and 30 genes"):
        checks.check_adata(adata[:0])
    with pytest.raises(ValueError, match="60 cells and 0 genes"):
        checks.check_adata(adata[:, :0])


def test_duplicated_names(adata, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names = ["Gene0", "Gene0", "Gene0", "Gene3", "Gene3", *adata.var_names[5:]]
    with pytest.raises(
        ValueError, match=r"2 gene names more than once: Gene0, Gene3. Call adata.var_names_make_unique\(\)"
    ):
        checks.check_adata(adata)
    adata.var_names = [f"g{j}" for j in range(30)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]
    checks.check_adata(adata)
    assert "1 cell names more than once: cell0" in caplog.text


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *itertools.product(FORMS, [bool, np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64]),
        (np.array, np.float16),  # scipy has no sparse float16
        (np.asfortranarray, np.float16),
    ],
)
def test_counts_in_any_form(adata, counts, dtype, form):
    stored = form(counts.astype(dtype))
    data = with_x(adata, stored, other=form(counts.astype(dtype)))
    before = fingerprint(data)
    for layer in (None, "other"):
        result = checks.read_counts(data, layer)
        assert isinstance(result, sparse.csr_matrix)
        assert result.dtype == np.float32
        assert result.has_canonical_format
        assert (result.data != 0).all()
        np.testing.assert_array_equal(result.toarray(), counts.astype(dtype).astype(np.float32))
        for part in (result.data, result.indices, result.indptr):
            with pytest.raises(ValueError, match="read-only"):
                part[:] = 0
    assert fingerprint(data) == before


def test_counts_as_they_should_be_are_not_copied(adata, counts):
    data = with_x(adata, sparse.csr_matrix(counts.astype(np.float32)))
    assert np.shares_memory(checks.read_counts(data).data, data.X.data)


def test_counts_of_a_view(adata, counts):
    for stored in (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts)):
        data = with_x(adata, stored)
        view = data[5:40, ::2]
        np.testing.assert_array_equal(checks.read_counts(view).toarray(), counts[5:40, ::2])
        assert view.is_view


def test_counts_with_zeros_and_duplicates_stored(adata):
    x = sparse.csr_matrix(
        (np.array([1.0, 0, 2, 3, 4]), np.array([5, 3, 5, 2, 0]), np.array([0, 4] + [5] * 59)), shape=(60, 30)
    )
    data = with_x(adata, x)
    before = fingerprint(data)
    result = checks.read_counts(data)
    assert fingerprint(data) == before
    np.testing.assert_array_equal(result.indices, [2, 5, 0])
    np.testing.assert_array_equal(result.data, [3, 3, 4])


@pytest.mark.parametrize("form", [np.array, sparse.csr_matrix, sparse.csc_matrix])
def test_backed_counts(adata, counts, form, tmp_path):
    path = tmp_path / "data.h5ad"
    with_x(adata, form(counts), other=form(counts)).write_h5ad(path)
    content = path.read_bytes()
    data = ad.read_h5ad(path, backed="r")
    assert data.isbacked
    for layer in (None, "other"):
        np.testing.assert_array_equal(checks.read_counts(data, layer).toarray(), counts)
    np.testing.assert_array_equal(checks.read_counts(data[10:20]).toarray(), counts[10:20])
    data.file.close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("form", [np.array, sparse.csr_matrix])
def test_lazy_data(adata, counts, form, tmp_path):
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    path = tmp_path / "data.h5ad"
    whole = with_x(adata, form(counts))
    whole.obsm["spatial"] = adata.obsm["spatial"]
    whole.write_h5ad(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ad.experimental.read_lazy(path)
        checks.check_adata(data)
        np.testing.assert_array_equal(checks.read_counts(data).toarray(), counts)
        np.testing.assert_array_equal(checks.check_coordinates(data, "spatial"), adata.obsm["spatial"])
        assert checks.check_library_key(data, "fov") == ["fov"]
        codes, names = field_codes(data.obs, "fov")
        assert suggested_library_key(data.obs) == ["fov"]
    np.testing.assert_array_equal(codes, np.repeat([0, 1, 2], 20))
    assert names == ["1", "2", "3"]


def test_dask_counts(adata, counts):
    array = pytest.importorskip("dask.array")
    data = with_x(adata, array.from_array(counts, chunks=(20, 30)))
    np.testing.assert_array_equal(checks.read_counts(data).toarray(), counts)


def test_no_such_layer(adata):
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(
        KeyError, match=r"`layer='Counts'` is not in `adata.layers`; there are: counts.*Did you mean 'counts'"
    ):
        checks.read_counts(adata, "Counts")
    with pytest.raises(ValueError, match=r"`adata.X` is None. Pass `layer=`; there are: counts"):
        checks.read_counts(ad.AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X}))


@pytest.mark.parametrize("form", [np.array, sparse.csr_matrix])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(adata, counts, form, value):
    counts[7, 4] = counts[7, 9] = counts[30, 2] = value
    data = with_x(adata, form(counts))
    before = fingerprint(data)
    with pytest.raises(ValueError, match="3 values that are NaN or infinite, the first in cell 'cell7', gene 'Gene4'"):
        checks.read_counts(data)
    assert fingerprint(data) == before


def test_too_large_for_float32_is_infinite(adata, counts):
    x = counts.astype(np.float64)
    x[0, 0] = 1e300
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        checks.read_counts(with_x(adata, x))


def test_negative(adata, counts):
    scaled = (counts - counts.mean(axis=0)) / (counts.std(axis=0) + 0.1)
    with pytest.raises(ValueError, match=r"negative values \(lowest -.*scaled or centred.*pass layer='raw_counts'"):
        checks.read_counts(with_x(adata, scaled, scaled=scaled.copy(), raw_counts=counts))


@pytest.mark.parametrize("dtype", [object, complex])
def test_not_numbers(adata, counts, dtype):
    data = with_x(adata, counts)
    data.layers["strange"] = counts.astype(dtype)
    with pytest.raises(TypeError, match=r"`adata.layers\['strange'\]` must hold numbers, but its dtype is"):
        checks.read_counts(data, "strange")


def test_masked(adata, counts):
    data = with_x(adata, counts)
    data.layers["masked"] = np.ma.masked_array(counts, mask=counts > 3)
    with pytest.raises(ValueError, match=r"is a masked array.*`missing=`"):
        checks.read_counts(data, "masked")


def test_nothing_but_zeros(adata, counts):
    with pytest.raises(ValueError, match=r"no counts: every entry is zero.*pass layer='counts'"):
        checks.read_counts(with_x(adata, np.zeros_like(counts), counts=counts))


def normalised(counts, target=250):
    return counts / counts.sum(axis=1, keepdims=True) * target


TRANSFORMED = {
    "totals of 250": (normalised, "looks normalised"),
    "totals of a million": (lambda x: normalised(x, 1e6), "looks normalised"),
    "by area": (lambda x: x / np.random.default_rng(1).uniform(50, 300, (60, 1)), "looks normalised"),
    "normalised, some genes": (lambda x: normalised(x) * (np.arange(30) < 18), "looks normalised"),
    "log1p of totals of 250": (lambda x: np.log1p(normalised(x)), "without the log1p, every cell has the same total"),
    "log1p of a million": (lambda x: np.log1p(normalised(x, 1e6)), "without the log1p, every cell has the same total"),
    "log2": (lambda x: np.log2(1 + normalised(x)), r"without the log2\(x \+ 1\), every cell has the same total"),
    "log10": (lambda x: np.log10(1 + normalised(x)), r"without the log10\(x \+ 1\), every cell has the same total"),
    "log1p of counts": (np.log1p, "without the log1p, the values of a cell are multiples"),
    "log1p, half precision": (lambda x: np.log1p(normalised(x)).astype(np.float16), "looks log-transformed"),
    "log1p, some genes": (
        lambda x: np.log1p(normalised(x)) * (np.arange(30) < 18),
        "without the log1p, the values of a cell are multiples",
    ),
    "log of something": (
        lambda x: np.log1p(np.where(x > 0, np.random.default_rng(2).gamma(2, 2, x.shape), 0)),
        r"looks log-transformed \(100 %",
    ),
    "square roots": (np.sqrt, "looks like square roots"),
}


@pytest.mark.parametrize("form", [np.array, sparse.csc_matrix])
@pytest.mark.parametrize("kind", TRANSFORMED)
def test_transformed(adata, counts, kind, form):
    counts[:, 0] += 1  # no cell is empty
    transform, message = TRANSFORMED[kind]
    x = transform(counts)
    if x.dtype == np.float16 and form is not np.array:
        x = x.astype(np.float32)  # scipy has no sparse float16
    data = with_x(adata, form(x), scaled=x - 1, counts=form(counts), again=form(counts.astype(int)))
    before = fingerprint(data)
    with pytest.raises(ValueError, match=message) as raised:
        checks.read_counts(data)
    assert "pass layer='counts'" in str(raised.value)
    assert "pass layer='again'" in str(raised.value)
    assert "'scaled'" not in str(raised.value)
    assert fingerprint(data) == before


def test_transformed_with_cells_without_counts(adata, counts):
    counts[:20] = 0
    x = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 100)
    with pytest.raises(ValueError, match="looks log-transformed"):
        checks.read_counts(with_x(adata, x))


def test_where_the_counts_are(adata, counts):
    data = with_x(adata, np.log1p(counts))
    with pytest.raises(ValueError, match="Nothing else in `adata` holds whole numbers: go back to the raw data"):
        checks.read_counts(data)
    data.raw = with_x(adata, counts)
    with pytest.raises(ValueError, match=r"`adata.raw` holds whole numbers: set adata.layers\['counts'\] = "):
        checks.read_counts(data)
    data = with_x(adata, counts, lognorm=np.log1p(counts))
    with pytest.raises(
        ValueError, match=r"`adata.layers\['lognorm'\]` looks.*`adata.X` holds whole numbers: pass layer=None"
    ):
        checks.read_counts(data, "lognorm")


def test_the_advice_about_raw_works(adata, counts):
    data = with_x(adata, counts)
    data.raw = data.copy()
    data.X = np.log1p(counts)
    data = data[:, 5:].copy()
    data.layers["counts"] = data.raw[:, data.var_names].X
    np.testing.assert_array_equal(checks.read_counts(data, "counts").toarray(), counts[:, 5:])


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_corrected_counts_pass_as_they_are(adata, counts, rng, share, caplog):
    x = counts * 10 * np.where(rng.random(counts.shape) < share, rng.beta(8, 2, counts.shape), 1).astype(np.float32)
    result = checks.read_counts(with_x(adata, x))
    np.testing.assert_array_equal(result.toarray(), x.astype(np.float32))
    assert "taken as counts" in caplog.text
    assert not checks.is_whole(result)


def test_whole_numbers_pass_without_a_word(adata, counts, caplog):
    equal = np.full((60, 30), 2.0)
    for x in (counts, counts * 1000, (counts > 0).astype(np.float32), equal):
        assert checks.is_whole(checks.read_counts(with_x(adata, x)))
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["cosmx_nsclc_profast", "seqfish_mouse_embryo2_z2", "starmap_mpfc_3sections"])
def test_real_counts(name, caplog):
    path = DATA / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ad.read_h5ad(path)
    counts = checks.read_counts(data)
    assert (counts != data.X).nnz == 0
    assert caplog.text == ""
    lognorm = counts.copy()
    lognorm.data /= np.repeat(np.asarray(counts.sum(axis=1)).ravel() / 250, np.diff(counts.indptr))
    data.X = lognorm.log1p()
    with pytest.raises(ValueError, match="log-transformed"):
        checks.read_counts(data)


def test_integerize(rng):
    x = sparse.csr_matrix(np.tile(np.array([0, 0.25, 3, 7.5, 0.01], dtype=np.float32), (20_000, 1)))
    before = x.toarray()
    result = checks.integerize(x, rng)
    assert checks.is_whole(result)
    assert result.dtype == np.float32
    assert (result.data > 0).all()
    dense = result.toarray()
    assert (np.abs(dense - before) < 1).all()
    np.testing.assert_array_equal(dense[:, 2], 3)
    np.testing.assert_allclose(dense.mean(axis=0), before[0], atol=5 * 0.5 / np.sqrt(20_000))
    np.testing.assert_array_equal(x.toarray(), before)
    again = checks.integerize(x, np.random.default_rng(0))
    assert (again != checks.integerize(x, np.random.default_rng(0))).nnz == 0
    assert (again != checks.integerize(x, np.random.default_rng(1))).nnz > 0


def test_describe_empty(counts, caplog):
    counts[:, 0] = 1
    counts[3] = 1
    checks.describe_empty(in_memory(sparse.csr_matrix(counts), False))
    assert caplog.text == ""
    counts[:3] = 0
    counts[:, 4:8] = 0
    checks.describe_empty(in_memory(sparse.csr_matrix(counts), False))
    assert "3 of 60 cells have no counts" in caplog.text
    assert "4 of 30 genes have no counts" in caplog.text


@pytest.mark.parametrize("form", [np.array, sparse.csr_matrix])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_layer_of_missing(adata, rng, form, dtype):
    mask = rng.random((60, 30)) < 0.2
    adata.layers["unmeasured"] = form(mask.astype(dtype))
    before = fingerprint(adata)
    result = checks.check_layer_of_missing(adata, "unmeasured")
    assert result.dtype == bool
    np.testing.assert_array_equal(result, mask)
    result[:] = True
    assert fingerprint(adata) == before
    assert checks.check_layer_of_missing(adata, None) is None


def test_bad_layer_of_missing(adata, caplog):
    adata.layers["mask"] = np.ones((60, 30), dtype=bool)
    with pytest.raises(
        KeyError, match=r"`missing='Mask'` is not in `adata.layers`; there are: mask. Did you mean 'mask'"
    ):
        checks.check_layer_of_missing(adata, "Mask")
    with pytest.raises(ValueError, match="marks every entry"):
        checks.check_layer_of_missing(adata, "mask")
    for strange in (2.0, np.nan, -1.0):
        values = np.zeros((60, 30))
        values[4, 5] = strange
        adata.layers["mask"] = values
        with pytest.raises(ValueError, match="must be a layer of True"):
            checks.check_layer_of_missing(adata, "mask")
    values = np.zeros((60, 30), dtype=bool)
    values[:, 3] = True
    adata.layers["mask"] = values
    checks.check_layer_of_missing(adata, "mask")
    assert "marks 1 genes in every cell: Gene3" in caplog.text


# --- genes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, tuple, np.array, pd.Index, pd.Series, lambda x: np.array(x, dtype=object)])
def test_genes_in_the_order_asked_for(adata, form):
    result = checks.check_genes(adata, form(["Gene7", "Gene0", "Gene29"]))
    assert result.dtype == np.int64
    np.testing.assert_array_equal(result, [7, 0, 29])


def test_other_ways_to_name_genes(adata):
    np.testing.assert_array_equal(checks.check_genes(adata, None), np.arange(30))
    np.testing.assert_array_equal(checks.check_genes(adata, "Gene4"), [4])
    np.testing.assert_array_equal(checks.check_genes(adata, (name for name in ["Gene4", "Gene1"])), [4, 1])
    for mask in (
        adata.var["highly_variable"],
        adata.var["highly_variable"].to_numpy(),
        [j % 3 == 0 for j in range(30)],
    ):
        np.testing.assert_array_equal(checks.check_genes(adata, mask), np.arange(0, 30, 3))


@pytest.mark.parametrize(
    ("genes", "error", "message"),
    [
        (["Gene1", *"abcdefg"], KeyError, "7 not in `adata.var_names`: a, b, c, d, e, … \\(7 in all\\)"),
        ("GENE1", KeyError, "Did you mean 'Gene1'"),
        ("highly_variable", KeyError, r"pass adata.var\['highly_variable'\]"),
        (["Gene1", "Gene2", "Gene1"], ValueError, "1 genes more than once: Gene1"),
        ([], ValueError, "names no gene"),
        ([False] * 30, ValueError, "names no gene"),
        ([True] * 4, ValueError, "mask of 4 values"),
        (pd.Series([True] * 30), ValueError, "take it from `adata.var`"),
        ([1, 2], TypeError, "must be gene names"),
        (5, TypeError, "must be gene names"),
    ],
)
def test_bad_genes(adata, genes, error, message):
    with pytest.raises(error, match=message):
        checks.check_genes(adata, genes)


# --- coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
@pytest.mark.parametrize("frame", [False, True])
def test_coordinates(adata, rng, n_axes, dtype, frame, caplog):
    points = (rng.random((60, n_axes)) * 100).astype(dtype)
    adata.obsm["where"] = pd.DataFrame(points, index=adata.obs_names, columns=list("xyz")[:n_axes]) if frame else points
    before = fingerprint(adata)
    result = checks.check_coordinates(adata, "where", np.repeat([0, 1, 2], 20))
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, points)
    result[:] = 0
    assert fingerprint(adata) == before
    assert caplog.text == ""


def test_no_coordinates(adata):
    adata.obsm["X_pca"] = np.zeros((60, 10))
    with pytest.raises(
        KeyError, match=r"`spatial_key='Spatial'` is not in `adata.obsm`; there are: spatial, X_pca.*Did you"
    ):
        checks.check_coordinates(adata, "Spatial")
    with pytest.raises(ValueError, match=r"two or three columns.*its shape is \(60, 10\)"):
        checks.check_coordinates(adata, "X_pca")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("frame", [False, True])
def test_coordinates_that_are_no_places(adata, value, frame):
    points = adata.obsm["spatial"].copy()
    points[[3, 8], [0, 1]] = value
    adata.obsm["spatial"] = pd.DataFrame(points, index=adata.obs_names, columns=["x", "y"]) if frame else points
    with pytest.raises(
        ValueError, match=r"NaN or infinite for 2 of 60 cells: 'cell3', 'cell8'. Leave them out: adata = "
    ):
        checks.check_coordinates(adata, "spatial")


def test_coordinates_of_nullable_dtype(adata):
    frame = pd.DataFrame({"x": range(60), "y": range(60)}, index=adata.obs_names, dtype="Float64")
    adata.obsm["spatial"] = frame
    np.testing.assert_array_equal(checks.check_coordinates(adata, "spatial"), np.repeat(np.arange(60.0)[:, None], 2, 1))
    frame.iloc[5, 0] = pd.NA
    adata.obsm["spatial"] = frame
    with pytest.raises(ValueError, match="'cell5'"):
        checks.check_coordinates(adata, "spatial")


def test_coordinates_that_are_no_numbers(adata):
    adata.obsm["spatial"] = pd.DataFrame({"x": ["1"] * 60, "y": 1.0}, index=adata.obs_names)
    with pytest.raises(TypeError, match="these columns do not: x"):
        checks.check_coordinates(adata, "spatial")
    adata.obsm["spatial"] = np.ones((60, 2), dtype=bool)
    with pytest.raises(TypeError, match="its dtype is bool"):
        checks.check_coordinates(adata, "spatial")


def test_cells_in_one_place(adata, caplog):
    codes = np.repeat([0, 1, 2], [20, 39, 1])
    adata.obsm["spatial"][:20] = 4
    checks.check_coordinates(adata, "spatial")
    assert caplog.text == ""
    checks.check_coordinates(adata, "spatial", codes)
    assert "in 1 of 3 fields of view all cells are in one and the same place" in caplog.text
    adata.obsm["spatial"][:] = 4
    checks.check_coordinates(adata, "spatial")
    assert "`adata.obsm['spatial']`: all cells are in one and the same place" in caplog.text


# --- fields of view ---------------------------------------------------------------------------------------------------


def test_library_key(adata):
    adata.obs["slide"] = ["s"] * 60
    before = fingerprint(adata)
    assert checks.check_library_key(adata, "fov") == ["fov"]
    assert checks.check_library_key(adata, ["slide", "fov"]) == ["slide", "fov"]
    assert checks.check_library_key(adata, ("slide",)) == ["slide"]
    del adata.obs["fov"]
    assert checks.check_library_key(adata, None) is None
    adata.obs["fov"] = pd.Categorical(np.repeat(["1", "2", "3"], 20))
    adata.obs = adata.obs[["fov", "area", "cell_type", "slide"]]
    assert fingerprint(adata) == before


def test_no_such_column(adata):
    message = (
        r"`library_key='FOV'` is not in `adata.obs`; categorical columns are: fov, cell_type. Did you mean 'fov'\?"
    )
    for key in ("FOV", ["cell_type", "FOV"]):
        with pytest.raises(KeyError, match=message):
            checks.check_library_key(adata, key)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (3, TypeError, "must be the name of a column"),
        ([3], TypeError, "must be the name of a column"),
        ([], ValueError, "at least one column"),
        (["fov", "fov"], ValueError, "none twice"),
        ("area", ValueError, "holds measurements"),
    ],
)
def test_bad_library_key(adata, key, error, message):
    with pytest.raises(error, match=message):
        checks.check_library_key(adata, key)


@pytest.mark.parametrize(
    "labels",
    [
        pd.Categorical([None, "1", None] + ["2"] * 57),
        [None, "1", np.nan] + ["2"] * 57,
        [np.nan, 1.0, np.nan] + [2.0] * 57,
        pd.array([pd.NA, 1, pd.NA] + [2] * 57, dtype="Int64"),
        pd.array([pd.NA, True, pd.NA] + [False] * 57, dtype="boolean"),
    ],
    ids=["categorical", "object", "float", "Int64", "boolean"],
)
def test_missing_labels(adata, labels):
    adata.obs["fov"] = labels
    with pytest.raises(
        ValueError, match=r"2 of 60 cells have no label in `adata.obs\['fov'\]`. Leave them out: adata = "
    ):
        checks.check_library_key(adata, "fov")
    with pytest.raises(ValueError, match="no label for 2 cells"):
        field_codes(adata.obs, "fov")


def test_missing_labels_written_as_text(adata, caplog):
    adata.obs["fov"] = ["nan", ""] + ["1"] * 58
    checks.check_library_key(adata, "fov")
    assert "the label of 2 cells is an empty or missing value written as text" in caplog.text


def test_warns_of_fields_that_are_not_named(adata):
    with pytest.warns(UserWarning, match=r"several: fov. Pass library_key='fov' if so"):
        checks.check_library_key(adata, None)
    adata.obs["slide"] = np.tile(["a", "b"], 30)
    with pytest.warns(UserWarning, match=r"Pass library_key=\['slide', 'fov'\] if so"):
        checks.check_library_key(adata, None)


def test_warns_of_labels_that_start_again_on_every_slide(adata):
    adata.obs["Slide_ID"] = np.repeat(["a", "b"], 30)
    with pytest.warns(UserWarning, match=r"Pass library_key=\['Slide_ID', 'fov'\] if the labels start again"):
        checks.check_library_key(adata, "fov")
    adata.obs["Slide_ID"] = np.repeat(["a", "b"], [20, 40])
    assert checks.check_library_key(adata, "fov") == ["fov"]
    assert checks.check_library_key(adata, ["Slide_ID", "fov"]) == ["Slide_ID", "fov"]


@pytest.mark.parametrize(
    ("labels", "names", "codes"),
    [
        (["b", "a", "b", "c"], ["a", "b", "c"], [1, 0, 1, 2]),
        (pd.Categorical(["b", "a", "b", "c"], categories=["x", "c", "b", "a"]), ["c", "b", "a"], [1, 2, 1, 0]),
        ([10, 9, 10, 2], ["2", "9", "10"], [2, 1, 2, 0]),
        ([10.0, 9.0, 10.0, 2.0], ["2", "9", "10"], [2, 1, 2, 0]),
        ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
        (pd.array([3, 1, 3, 1], dtype="Int64"), ["1", "3"], [1, 0, 1, 0]),
        (pd.array(["q", "p", "q", "q"], dtype="string"), ["p", "q"], [1, 0, 1, 1]),
        (pd.array([True, False, True, True], dtype="boolean"), ["False", "True"], [1, 0, 1, 1]),
        (["1", 1, "1", 2], ["1", "2", "1-1"], [2, 0, 2, 1]),
    ],
)
def test_codes_of_one_column(labels, names, codes):
    obs = pd.DataFrame({"fov": labels})
    if list(map(type, labels)) == [str, int, str, int]:
        obs["fov"] = obs["fov"].astype(object)
    before = obs.copy()
    found, found_names = field_codes(obs, "fov")
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, codes)
    assert found_names == names
    pd.testing.assert_frame_equal(obs, before)


def test_codes_of_several_columns():
    obs = pd.DataFrame(
        {
            "slide": pd.Categorical(["t", "s", "t", "s", "t"], categories=["t", "s", "unused"]),
            "fov": [2, 1, 1, 3, 2],
            "side": ["l", "l", "r", "l", "l"],
        }
    )
    codes, names = field_codes(obs, ["slide", "fov"])
    assert names == ["t/1", "t/2", "s/1", "s/3"]
    np.testing.assert_array_equal(codes, [1, 2, 0, 3, 1])
    codes, names = field_codes(obs, ["fov", "slide", "side"])
    assert names == ["1/t/r", "1/s/l", "2/t/l", "3/s/l"]
    np.testing.assert_array_equal(codes, [2, 1, 0, 3, 2])


def test_codes_without_a_column_and_of_many(rng):
    obs = pd.DataFrame({"fov": rng.integers(0, 300, 2000), "slide": rng.integers(0, 200, 2000)})
    codes, names = field_codes(obs, None)
    np.testing.assert_array_equal(codes, np.zeros(2000))
    assert names == ["all"]
    codes, names = field_codes(obs, ["slide", "fov"])
    pairs = sorted(set(zip(obs["slide"], obs["fov"])))
    assert names == [f"{slide}/{fov}" for slide, fov in pairs]
    assert [pairs[k] for k in codes] == list(zip(obs["slide"], obs["fov"]))


def test_names_of_fields_are_unique():
    obs = pd.DataFrame({"a": ["x/y", "x", "x"], "b": ["z", "y/z", "w"]})
    codes, names = field_codes(obs, ["a", "b"])
    assert names == ["x/w", "x/y/z", "x/y/z-1"]
    np.testing.assert_array_equal(codes, [2, 1, 0])


@pytest.mark.parametrize(
    "name", ["fov", "FOV", "fov_id", "Field of View", "slide", "slide_ID_numeric", "Run_Tissue_name"]
)
@pytest.mark.parametrize(
    "labels",
    [pd.Categorical(list("aabbcc")), list("aabbcc"), [1, 1, 2, 2, 3, 3], [1.0, 1, 2, 2, 3, np.nan]],
    ids=["categorical", "object", "int", "float"],
)
def test_columns_that_look_like_fields(name, labels):
    assert fov_like_columns(pd.DataFrame({"cell_type": list("xyxyxy"), name: labels})) == [name]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("region", list("aabbcc")),
        ("cell_type", list("aabbcc")),
        ("layer", list("aabbcc")),
        ("fov_x", list("aabbcc")),
        ("fov", ["a"] * 6),
        ("fov", list("abcdef")),
        ("fov", [0.5, 0.5, 1, 1, 2, 2]),
    ],
)
def test_columns_that_do_not_look_like_fields(name, labels):
    obs = pd.DataFrame({name: labels})
    assert fov_like_columns(obs) == []
    assert suggested_library_key(obs) == []


def test_suggested_library_key():
    obs = pd.DataFrame({"sample": list("aaaabbbb"), "slide": list("ttttuuuu"), "fov": list("11221122")})
    assert fov_like_columns(obs) == ["fov", "sample", "slide"]
    assert suggested_library_key(obs) == ["sample", "fov"]
    assert suggested_library_key(obs.assign(fov=list("11223344"))) == ["fov"]
    assert suggested_library_key(obs[["slide"]]) == ["slide"]


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_connectivities(adata, rng, form):
    weights = np.round(rng.random((60, 60)), 3) * (rng.random((60, 60)) < 0.1)
    adata.obsp["my_graph"] = form(weights)
    before = fingerprint(adata)
    result = checks.check_connectivities(adata, "my_graph")
    assert isinstance(result, sparse.csr_matrix)
    np.testing.assert_array_equal(result.toarray(), weights.astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        result.data[:] = 9
    assert fingerprint(adata) == before


def test_bad_connectivities(adata, caplog):
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(np.eye(60))
    adata.obsp["spatial_distances"] = sparse.csr_matrix(np.eye(60))
    adata.obsp["negative"] = -np.eye(60)
    adata.obsp["nan"] = np.full((60, 60), np.nan)
    adata.obsp["none"] = sparse.csr_matrix((60, 60))
    with pytest.raises(
        KeyError, match=r"`connectivity_key='spatial_connectivity'` is not in.*mean 'spatial_connectivities'"
    ):
        checks.check_connectivities(adata, "spatial_connectivity")
    with pytest.raises(ValueError, match="names distances"):
        checks.check_connectivities(adata, "spatial_distances")
    with pytest.raises(ValueError, match=r"`adata.obsp\['negative'\]` holds 60 negative weights"):
        checks.check_connectivities(adata, "negative")
    with pytest.raises(ValueError, match="3600 weights that are NaN"):
        checks.check_connectivities(adata, "nan")
    assert caplog.text == ""
    assert checks.check_connectivities(adata, "none").nnz == 0
    assert "has no edges" in caplog.text


# --- what is written --------------------------------------------------------------------------------------------------


def test_key_added(adata):
    checks.check_key_added(adata, "spaformer")
    checks.check_key_added(adata, "fov")
    checks.check_key_added(adata, "fov", slots=[("layers", "fov")], mark="ours")


@pytest.mark.parametrize("key", ["", " ", "a/b", ".", "..", "__x"])
def test_key_that_no_file_holds(adata, key):
    with pytest.raises(ValueError, match="cannot be written to h5ad and zarr"):
        checks.check_key_added(adata, key)


def test_key_that_is_no_string(adata):
    with pytest.raises(TypeError, match="`key_added=None` must be a string"):
        checks.check_key_added(adata, None)


def test_only_own_results_are_overwritten(adata, counts):
    slots = [("layers", "spaformer"), ("obsm", "X_spaformer")]
    adata.layers["spaformer"] = counts
    with pytest.raises(ValueError, match=r"would overwrite adata.layers\['spaformer'\]"):
        checks.check_key_added(adata, "spaformer", slots=slots, mark="ours")
    adata.uns["spaformer"] = {"params": {"theirs": 1}}
    with pytest.raises(ValueError, match=r"adata.layers\['spaformer'\], adata.uns\['spaformer'\]"):
        checks.check_key_added(adata, "spaformer", slots=slots, mark="ours")
    adata.uns["spaformer"] = {"params": {"ours": 1}}
    checks.check_key_added(adata, "spaformer", slots=slots, mark="ours")


def test_checks_log_through_one_logger(adata, counts, caplog):
    counts[0] = 0
    with caplog.at_level(logging.WARNING):
        checks.describe_empty(in_memory(sparse.csr_matrix(counts), False))
    assert {record.name for record in caplog.records} == {"spaformer_sc"}
