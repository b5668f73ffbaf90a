"""Data as the readers of squidpy and spatialdata-io hand them over, from small files of the vendors' layouts."""

from __future__ import annotations

import json
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spaformer_sc as sf

from .conftest import untouched


def package(name):
    """Import what a test needs; skip, and say why, where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'spaformer_sc[readers]'")


@pytest.fixture(scope="module")
def cells():
    """Three FOVs of 60 cells, 30 genes; their positions adjoin."""
    return sf.datasets.simulated_tissue(n_fovs=3, n_cells=60, n_genes=30)


def quietly(function, *args, **kwargs):
    """Call a reader without the warnings of its own and of what it calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def impute(data, **choices):
    return sf.tl.impute(data, **{"quality": "fast", "max_epochs": 2, "progress": False} | choices)


def counts_of(cells, *controls):
    """Counts as a frame, with columns of controls behind the genes."""
    counts = pd.DataFrame(cells.X.toarray().astype(int), columns=list(cells.var_names))
    return counts.assign(**dict.fromkeys(controls, np.arange(cells.n_obs) % 2))


def circles(xy, shape, radius=2):
    """An image of labels: cell i is a disc of the value i + 1 around its place."""
    y, x = np.indices(shape)
    image = np.zeros(shape, dtype=np.uint16)
    for number, (left, top) in enumerate(xy, start=1):
        image[(x + 0.5 - left) ** 2 + (y + 0.5 - top) ** 2 <= radius**2] = number
    return image


@pytest.fixture(scope="module")
def cosmx(cells, tmp_path_factory):
    """A folder of CosMx: FOVs with positions in pixels, local and global; a row of background that has no cell."""
    from PIL import Image

    path = tmp_path_factory.mktemp("cosmx")
    number = cells.obs["fov"].cat.codes.to_numpy() + 1
    xy = cells.obsm["spatial"]
    local = np.empty_like(xy)
    ids = np.empty(cells.n_obs, dtype=int)
    for fov in np.unique(number):
        here = number == fov
        local[here] = xy[here] - xy[here].min(axis=0) + 5
        ids[here] = np.arange(here.sum()) + 1
        for folder, kind in (("CellComposite", "jpg"), ("CellLabels", "tif")):
            (path / folder).mkdir(exist_ok=True)
            shape = tuple(int(side) + 8 for side in local[here].max(axis=0)[::-1])
            image = circles(local[here], shape)
            if kind == "jpg":
                image = np.repeat(image.astype(np.uint8)[..., None], 3, axis=2)
            Image.fromarray(image[::-1]).save(path / folder / f"{folder}_F{fov:03d}.{kind}")
    counts = counts_of(cells, "NegPrb3", "NegPrb5", "SystemControl1")
    counts.insert(0, "cell_ID", ids)
    counts.insert(0, "fov", number)
    background = counts.drop_duplicates("fov").assign(cell_ID=0)
    pd.concat([background, counts]).to_csv(path / "lung_exprMat_file.csv", index=False)
    pd.DataFrame(
        {
            "fov": number, "cell_ID": ids, "Area": 100, "AspectRatio": 1.0,
            "CenterX_local_px": local[:, 0], "CenterY_local_px": local[:, 1],
            "CenterX_global_px": xy[:, 0], "CenterY_global_px": xy[:, 1],
            "Width": 10, "Height": 10, "Mean.PanCK": 7,
        }
    ).to_csv(path / "lung_metadata_file.csv", index=False)  # fmt: skip
    corners = pd.DataFrame(xy, columns=["x_global_px", "y_global_px"]).groupby(number).min()
    corners.rename_axis("fov").reset_index().to_csv(path / "lung_fov_positions_file.csv", index=False)
    return path


@pytest.fixture(scope="module")
def merscope(cells, tmp_path_factory):
    """A folder of MERSCOPE: one tissue in µm, whose FOVs are camera positions."""
    geopandas = package("geopandas")
    shapely = package("shapely")
    path = tmp_path_factory.mktemp("slide1") / "region_0"
    (path / "images").mkdir(parents=True)
    ids = pd.Index([str(7 * 10**14 + i) for i in range(cells.n_obs)])
    xy = cells.obsm["spatial"]
    counts_of(cells, "Blank-1", "Blank-2").set_index(ids).rename_axis("cell").to_csv(path / "cell_by_gene.csv")
    pd.DataFrame(
        {
            "fov": cells.obs["fov"].cat.codes.to_numpy(), "volume": 500.0,
            "center_x": xy[:, 0], "center_y": xy[:, 1], "min_x": xy[:, 0] - 2, "max_x": xy[:, 0] + 2,
        },
        index=ids,
    ).rename_axis("EntityID").to_csv(path / "cell_metadata.csv")  # fmt: skip
    np.savetxt(path / "images" / "micron_to_mosaic_pixel_transform.csv", [[2.0, 0, 30], [0, 2.0, 40], [0, 0, 1]])
    squares = [shapely.MultiPolygon([shapely.box(x - 2, y - 2, x + 2, y + 2)]) for x, y in xy]
    outlines = geopandas.GeoDataFrame({"EntityID": ids, "ZIndex": 0, "Geometry": squares}, geometry="Geometry")
    outlines.to_parquet(path / "cell_boundaries.parquet")
    return path


@pytest.fixture(scope="module")
def xenium(cells, tmp_path_factory):
    """A folder of Xenium (its version 2): one tissue in µm; controls are features of another type."""
    zarr = package("zarr")
    path = tmp_path_factory.mktemp("xenium")
    counts = counts_of(cells, "NegControlProbe_00042", "BLANK_0006")
    n = len(counts)
    kinds = ["Gene Expression"] * cells.n_vars + ["Negative Control Probe", "Unassigned Codeword"]
    raw = np.stack([np.arange(1, n + 1), np.ones(n)], axis=1).astype(np.uint32)
    ids = ["".join(chr(ord("a") + int(digit, 16)) for digit in f"{first:08x}") + "-1" for first, _ in raw]
    matrix = sparse.csc_matrix(counts.to_numpy().T)
    with h5py.File(path / "cell_feature_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(ids, dtype="S")
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(matrix, part)
        group["shape"] = matrix.shape
        features = group.create_group("features")
        features["id"] = features["name"] = np.array(counts.columns, dtype="S")
        features["feature_type"] = np.array(kinds, dtype="S")
        features["genome"] = np.array(["GRCh38"] * len(kinds), dtype="S")
    xy = cells.obsm["spatial"]
    pd.DataFrame(
        {
            "cell_id": ids, "x_centroid": xy[:, 0], "y_centroid": xy[:, 1], "transcript_counts": counts.sum(axis=1),
            "cell_area": 50.0, "nucleus_area": 20.0,
        }
    ).to_parquet(path / "cells.parquet", index=False)  # fmt: skip
    specs = {"analysis_sw_version": "xenium-2.0.0.10", "pixel_size": 0.5, "run_name": "r", "region_name": "s"}
    (path / "experiment.xenium").write_text(json.dumps(specs))
    corners = np.array([[-2, -2], [2, -2], [2, 2], [-2, 2], [-2, -2]])
    vertices = (xy[:, None] + corners).reshape(-1, 2)
    outlines = pd.DataFrame({"cell_id": np.repeat(ids, 5), "vertex_x": vertices[:, 0], "vertex_y": vertices[:, 1]})
    outlines.assign(label_id=np.repeat(np.arange(n) + 1, 5)).to_parquet(path / "cell_boundaries.parquet", index=False)
    store = zarr.storage.ZipStore(path / "cells.zarr.zip", mode="w")
    root = zarr.create_group(store, zarr_format=2)
    root.create_array("cell_id", data=raw)
    names = {"column_names": ["z_level", "nucleus_count"]}
    root.create_array("cell_summary", data=np.zeros((n, 2)), attributes=names)
    shape = tuple(int(2 * side) + 10 for side in xy.max(axis=0)[::-1])
    for mask in "01":
        root.create_array(f"masks/{mask}", data=circles(2 * xy, shape, radius=4).astype(np.uint32))
        root.create_array(f"polygon_sets/{mask}/cell_index", data=np.arange(n, dtype=np.uint32))
    store.close()
    return path


# --- squidpy, scanpy --------------------------------------------------------------------------------------------------


def nanostring(path):
    files = {"counts_file": "lung_exprMat_file.csv", "meta_file": "lung_metadata_file.csv"}
    return quietly(package("squidpy").read.nanostring, path, fov_file="lung_fov_positions_file.csv", **files)


def test_nanostring_has_local_positions_and_needs_the_fov(cosmx, cells, no_training):
    adata = nanostring(cosmx)
    np.testing.assert_allclose(adata.obsm["spatial_fov"], cells.obsm["spatial"])
    assert adata.obsm["spatial"].max() < cells.obsm["spatial"].max() / 1.5
    wanted = r"`spatial_key='spatial'`: the 3 images .*'fov'.* lie on top of each other.* Pass library_key='fov', or "
    for ask in (
        lambda: impute(adata),
        lambda: sf.pp.tile(adata),
        lambda: sf.pp.positional_encoding(adata, "linear"),
        lambda: sf.SpaFormer(progress=False).fit(adata),
    ):
        with (
            untouched(adata),
            pytest.warns(UserWarning, match="Pass library_key='fov' if so"),
            pytest.raises(ValueError, match=wanted + "spatial_key='spatial_fov', where they lie beside each other"),
        ):
            ask()


def test_nanostring_local_and_global_positions_give_the_same_result(cosmx, caplog):
    results = [nanostring(cosmx) for _ in range(2)]
    for adata, key in zip(results, ("spatial", "spatial_fov"), strict=True):
        impute(adata, library_key="fov", spatial_key=key)
    local, world = results
    np.testing.assert_allclose(local.layers["spaformer"], world.layers["spaformer"], rtol=1e-4, atol=1e-5)
    assert local.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 3
    # Controls are named, and stay.
    assert "3 of 33 features are no genes by their name or type: NegPrb3, NegPrb5, SystemControl1" in caplog.text
    assert "adata[:, ~adata.var_names.str.startswith(('NegPrb', 'SystemControl'))].copy()" in caplog.text
    assert np.isfinite(local.layers["spaformer"]).all()
    caplog.clear()
    genes = local[:, ~local.var_names.str.startswith(("NegPrb", "SystemControl"))].copy()
    sf.SpaFormer(library_key="fov", quality="fast", max_epochs=1, progress=False).fit(genes)
    assert "no genes" not in caplog.text


def test_nanostring_without_fovs_at_global_positions(cosmx):
    adata = nanostring(cosmx)
    with pytest.warns(UserWarning, match="look as if there were several: fov"):
        impute(adata, spatial_key="spatial_fov")
    assert adata.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 1


@pytest.mark.usefixtures("unseen")
def test_picture_of_a_result_at_local_positions(cosmx, caplog):
    plt = package("matplotlib").pyplot
    adata = nanostring(cosmx)
    impute(adata, library_key="fov")
    drawn = "drawn beside one another"
    for choices, expected in (({}, True), ({"fov": "2"}, False), ({"spatial_key": "spatial_fov"}, False)):
        caplog.clear()
        axes = sf.pl.imputed(adata, adata.var_names[0], **choices)
        assert (drawn in caplog.text) == expected
        places = np.asarray(axes[0, 0].collections[0].get_offsets())
        plt.close("all")
    wanted = np.asarray(adata.obsm["spatial_fov"], dtype=float)
    np.testing.assert_allclose(places[np.lexsort(places.T)], wanted[np.lexsort(wanted.T)])


def test_vizgen_is_one_tissue(merscope, cells, caplog):
    read = package("squidpy").read.vizgen
    adata = quietly(read, merscope, counts_file="cell_by_gene.csv", meta_file="cell_metadata.csv")
    assert list(adata.obsm["blank_genes"]) == ["Blank-1", "Blank-2"]
    with pytest.warns(UserWarning, match="look as if there were several: fov"):
        impute(adata)
    np.testing.assert_allclose(adata.obsm["spatial"], cells.obsm["spatial"])
    assert adata.layers["spaformer"].shape == cells.shape
    assert adata.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 1
    assert "no genes" not in caplog.text


@pytest.mark.parametrize("gex_only", [True, False])
def test_xenium_of_scanpy(xenium, cells, caplog, gex_only):
    adata = quietly(package("scanpy").read_10x_h5, xenium / "cell_feature_matrix.h5", gex_only=gex_only)
    places = pd.read_parquet(xenium / "cells.parquet").set_index("cell_id").loc[adata.obs_names]
    adata.obsm["spatial"] = places[["x_centroid", "y_centroid"]].to_numpy()
    impute(adata)
    assert adata.layers["spaformer"].shape == (cells.n_obs, cells.n_vars + (0 if gex_only else 2))
    assert ("adata[:, adata.var['feature_types'] == 'Gene Expression'].copy()" in caplog.text) != gex_only


# --- spatialdata-io ---------------------------------------------------------------------------------------------------


def of_spatialdata_io(platform, path):
    read = getattr(package("spatialdata_io"), platform)
    choices = {
        "cosmx": {"transcripts": False},
        "merscope": {"transcripts": False, "mosaic_images": False},
        "xenium": dict.fromkeys(
            ("transcripts", "morphology_mip", "morphology_focus", "aligned_images", "nucleus_boundaries"), False
        ),
    }
    return quietly(read, path, **choices[platform])


@pytest.mark.parametrize("platform", ["cosmx", "merscope", "xenium"])
def test_spatialdata_io(platform, cells, request):
    path = request.getfixturevalue(platform)
    sdata = of_spatialdata_io(platform, path)
    table = sdata.tables["table"]
    places = table.obsm["global" if platform == "cosmx" else "spatial"]
    np.testing.assert_allclose(places, cells.obsm["spatial"])
    alone = table.copy()
    elements = {name: element for _, name, element in sdata.gen_elements()}
    choices = {"library_key": "fov" if platform == "cosmx" else None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`library_key` is None")  # of the camera positions of MERSCOPE
        impute(sdata, table_key="table", **choices)
        impute(alone, **choices)
    assert sdata.tables["table"] is table
    assert all(element is elements[name] for _, name, element in sdata.gen_elements())
    np.testing.assert_array_equal(table.layers["spaformer"], alone.layers["spaformer"])
    np.testing.assert_array_equal(sf.tl.interval(sdata).upper, sf.tl.interval(alone).upper)


def test_cosmx_of_spatialdata_io_needs_the_fov(cosmx, no_training):
    sdata = of_spatialdata_io("cosmx", cosmx)
    wanted = "Pass library_key='fov', or spatial_key='global', where they lie beside each other"
    with pytest.warns(UserWarning, match="library_key"), pytest.raises(ValueError, match=wanted):
        impute(sdata)


@pytest.mark.parametrize(
    ("platform", "scale", "shift", "error"),
    [("merscope", 2, (30, 40), 1e-6), ("xenium", 2, (0, 0), 2), ("cosmx", 1, (0, 0), 0.5)],
)
def test_centroids_of_what_spatialdata_io_reads(platform, scale, shift, error, cells, request):
    sdata = of_spatialdata_io(platform, request.getfixturevalue(platform))
    sf.pp.centroids(sdata, key_added="pixels")
    found = sdata.tables["table"].obsm["pixels"]
    np.testing.assert_allclose(found, scale * cells.obsm["spatial"] + shift, atol=error)
