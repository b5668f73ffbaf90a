"""Tiling: no cell lost, weights that sum to one, no seam; and `pp.tile`."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spaformer_sc.pp
from spaformer_sc.data._fields import _among
from spaformer_sc.data._graph import spatial_graph, typical_distance
from spaformer_sc.data._tiling import tile


def scattered(seed):
    """Positions of some kind or other: even, clustered, on a grid, on a line, three axes."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(200, 1500))
    kinds = [
        lambda: rng.random((n, 2)) * [100, 30],
        lambda: rng.normal(size=(n, 2)) * 3 + rng.integers(0, 4, (n, 1)) * 20,
        lambda: np.round(rng.random((n, 2)) * 12),
        lambda: np.column_stack([np.full(n, 5.0), rng.random(n) * 50]),
        lambda: rng.random((n, 3)) * 40,
    ]
    return kinds[seed % len(kinds)]()


def total_weight(tiles, n):
    total = np.zeros(n)
    for part in tiles:
        np.add.at(total, part.context, part.weight.astype(np.float64))
    return total


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("margin", [0, 0.5, 8])
def test_every_cell_once_and_weights_of_one(seed, margin):
    points = scattered(seed)
    tiles = tile(points, tile_size=100, margin=margin)
    assert len(tiles) > 1
    np.testing.assert_array_equal(np.sort(np.concatenate([part.core for part in tiles])), np.arange(len(points)))
    np.testing.assert_allclose(total_weight(tiles, len(points)), 1, atol=1e-6)
    for part in tiles:
        assert part.weight.dtype == np.float32
        assert part.weight.shape == part.context.shape
        assert part.weight.min() >= 0
        assert part.weight.max() <= 1
        assert (np.diff(part.context) > 0).all()
        assert (np.diff(part.core) > 0).all()
        assert np.isin(part.core, part.context).all()
        if margin == 0:
            np.testing.assert_array_equal(part.core, part.context)


@pytest.mark.parametrize("n", [151, 200, 201, 299, 1000, 1234])
def test_windows_are_balanced(n):
    points = np.random.default_rng(n).random((n, 2))
    sizes = [part.core.size for part in tile(points, tile_size=100, margin=0.01)]
    assert len(sizes) == -(-n // 100)
    assert max(sizes) <= 100
    assert max(sizes) - min(sizes) <= 1 + len(sizes) // 4


@pytest.mark.parametrize("n", [1, 99, 100, 150])
def test_a_small_field_stays_whole(n):
    (only,) = tile(np.random.default_rng(0).random((n, 2)), tile_size=100, margin=0.1)
    np.testing.assert_array_equal(only.core, np.arange(n))
    np.testing.assert_array_equal(only.context, np.arange(n))
    np.testing.assert_array_equal(only.weight, np.ones(n, dtype=np.float32))


def test_no_cell_no_tile():
    assert tile(np.empty((0, 2)), margin=1) == []


def test_one_cut_by_hand():
    points = np.column_stack([np.arange(10.0), np.zeros(10)])
    left, right = tile(points, tile_size=5, margin=4)
    np.testing.assert_array_equal(left.core, np.arange(5))
    np.testing.assert_array_equal(right.core, np.arange(5, 10))
    np.testing.assert_array_equal(left.context, np.arange(9))  # the cut lies at 4.5, its margin ends at 8.5
    np.testing.assert_array_equal(right.context, np.arange(1, 10))
    np.testing.assert_allclose(left.weight, [1, 1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0])
    np.testing.assert_allclose(right.weight, [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1])


@pytest.mark.parametrize("seed", range(10))
def test_cells_with_weight_lie_half_a_margin_inside_the_context(seed):
    points = scattered(seed)
    margin = 6.0
    for part in tile(points, tile_size=100, margin=margin):
        outside = np.setdiff1d(np.arange(len(points)), part.context)
        weighted = points[part.context[part.weight > 0]][:, :2]
        if outside.size:
            gap = np.abs(weighted[:, None] - points[None, outside, :2]).max(axis=2)
            assert gap.min() > margin / 2
        box_low, box_high = points[part.core, :2].min(axis=0), points[part.core, :2].max(axis=0)
        around = ((points[:, :2] >= box_low - margin) & (points[:, :2] <= box_high + margin)).all(axis=1)
        assert np.isin(np.flatnonzero(around), part.context).all()


@pytest.mark.parametrize("seed", range(3))
def test_weights_change_little_from_cell_to_cell(seed):
    rng = np.random.default_rng(seed)
    points = rng.random((3000, 2)) * 100
    margin = 10.0
    tiles = tile(points, tile_size=200, margin=margin)
    weights = np.zeros((len(tiles), len(points)))
    for k, part in enumerate(tiles):
        weights[k, part.context] = part.weight
    edges = spatial_graph(points).tocoo()
    length = np.linalg.norm(points[edges.row] - points[edges.col], axis=1)
    change = np.abs(weights[:, edges.row] - weights[:, edges.col])
    # every cut has a slope of 1 / margin, and where tiles meet a cell lies in the reach of a few cuts
    assert (change <= 4 * length / margin + 1e-6).all()
    assert (weights[:, edges.row] < 1).any()


@pytest.mark.parametrize("seed", range(3))
def test_context_holds_both_rings_of_neighbours(seed):
    points = np.random.default_rng(seed).random((3000, 2)) * 55
    graph = spatial_graph(points)
    edges = graph.tocoo()
    longest = np.linalg.norm(points[edges.row] - points[edges.col], axis=1).max()
    two_steps = graph + graph @ graph
    for part in tile(points, tile_size=500, margin=4 * longest):
        weighted = part.context[part.weight > 0]
        assert np.isin(two_steps[weighted].indices, part.context).all()


def test_a_margin_of_eight_distances_holds_both_rings_in_even_tissue():
    grid = np.stack(np.meshgrid(np.arange(45.0), np.arange(45.0)), axis=-1).reshape(-1, 2)
    points = grid + np.random.default_rng(0).uniform(-0.2, 0.2, grid.shape)
    graph = spatial_graph(points)
    two_steps = graph + graph @ graph
    for part in tile(points, tile_size=300, margin=8 * typical_distance(points, graph)):
        weighted = part.context[part.weight > 0]
        assert np.isin(two_steps[weighted].indices, part.context).all()


def test_a_graph_of_the_context_is_the_graph_of_the_whole_where_there_is_weight():
    points = np.random.default_rng(4).random((3000, 2)) * 55
    whole = spatial_graph(points)
    for part in tile(points, tile_size=400, margin=8.0):
        inner = part.weight > 0
        of_context = spatial_graph(points[part.context])
        assert (of_context[inner] != whole[part.context[inner]][:, part.context]).nnz == 0


@pytest.mark.parametrize("seed", range(5))
def test_order_of_cells_does_not_matter(seed):
    points = scattered(seed)
    order = np.random.default_rng(seed).permutation(len(points))
    tiles, shuffled = (tile(x, tile_size=100, margin=3.0) for x in (points, points[order]))
    assert len(tiles) == len(shuffled)
    for one, other in zip(tiles, shuffled):
        np.testing.assert_array_equal(one.core, np.sort(order[other.core]))
        back = np.argsort(order[other.context])
        np.testing.assert_array_equal(one.context, order[other.context][back])
        np.testing.assert_array_equal(one.weight, other.weight[back])


def test_cells_in_one_place_stay_together():
    points = np.concatenate([np.ones((500, 2)), np.random.default_rng(0).random((300, 2)) * 9])
    tiles = tile(points, tile_size=100, margin=1.0)
    assert sum(np.isin(np.arange(500), part.core).any() for part in tiles) == 1
    np.testing.assert_allclose(total_weight(tiles, 800), 1, atol=1e-6)
    assert len(tile(np.ones((500, 2)), tile_size=100, margin=1.0)) == 1


def test_a_cut_between_ties_is_the_one_nearest_the_middle():
    for n_cells, expected in (([10, 45, 45], [55, 45]), ([45, 45, 10], [45, 55])):
        points = np.column_stack([np.repeat([0.0, 1.0, 2.0], n_cells), np.zeros(100)])
        assert [part.core.size for part in tile(points, tile_size=60, margin=0.1)] == expected


def test_neighbouring_numbers_are_cut_apart():
    close = 1.0 + np.spacing(1.0)
    points = np.column_stack([np.repeat([1.0, close], 10), np.zeros(20)])
    for margin in (0.0, 1e-300, 1.0):
        tiles = tile(points, tile_size=10, margin=margin)
        assert [part.core.size for part in tiles] == [10, 10]
        np.testing.assert_allclose(total_weight(tiles, 20), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tile_size": 0, "margin": 1}, ValueError, "`tile_size=0`"),
        ({"tile_size": 10.5, "margin": 1}, TypeError, "`tile_size=10.5`"),
        ({"margin": -1}, ValueError, "`margin=-1`"),
        ({"margin": np.nan}, ValueError, "`margin=nan`"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tile(np.zeros((9, 2)), **arguments)


# --- pp.tile ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"field": pd.Categorical(np.repeat(["b", "a", "c"], [150, 250, 20]))}, index=[f"cell{i}" for i in range(420)]
    )
    return ad.AnnData(np.ones((420, 3), dtype=np.float32), obs=obs, obsm={"spatial": rng.random((420, 2)) * 100})


def test_column_of_tiles(adata):
    before = adata.copy()
    assert spaformer_sc.pp.tile(adata, tile_size=100) is None
    column = adata.obs["tile"]
    assert isinstance(column.dtype, pd.CategoricalDtype)
    assert list(column.cat.categories) == ["0", "1", "2", "3", "4"]
    assert column.value_counts().max() <= 100
    for k, part in enumerate(tile(adata.obsm["spatial"], tile_size=100, margin=0)):
        assert (column.iloc[part.core] == str(k)).all()
    assert adata.uns["tile"] == {"params": {"spatial_key": "spatial", "library_key": None, "tile_size": 100}}
    pd.testing.assert_frame_equal(adata.obs.drop(columns="tile"), before.obs)
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])
    np.testing.assert_array_equal(adata.X, before.X)


def test_tiles_do_not_cross_fields(adata):
    spaformer_sc.pp.tile(adata, library_key="field", tile_size=100, key_added="window")
    assert list(adata.obs["window"].cat.categories) == ["a/0", "a/1", "a/2", "b/0", "c/0"]
    assert (adata.obs["window"].astype(str).str[0] == adata.obs["field"].astype(str)).all()


def test_copy_leaves_the_original(adata):
    result = spaformer_sc.pp.tile(adata, tile_size=100, copy=True)
    assert "tile" in result.obs
    assert "tile" not in adata.obs
    assert "tile" not in adata.uns


def test_a_view_becomes_an_object_of_its_own(adata):
    view = adata[:200]
    spaformer_sc.pp.tile(view, tile_size=100)
    assert view.obs["tile"].nunique() == 2
    assert "tile" not in adata.obs


def test_own_column_is_replaced_and_no_other(adata):
    spaformer_sc.pp.tile(adata, tile_size=100)
    spaformer_sc.pp.tile(adata, tile_size=400)
    assert adata.obs["tile"].nunique() == 1
    with pytest.raises(ValueError, match=r"`key_added='field'` would overwrite adata.obs\['field'\]"):
        spaformer_sc.pp.tile(adata, key_added="field")
    with pytest.raises(ValueError, match="also in `library_key`"):
        spaformer_sc.pp.tile(adata, library_key="tile", key_added="tile")
    assert list(adata.obs) == ["field", "tile"]


def test_tiles_survive_a_file(adata, tmp_path):
    spaformer_sc.pp.tile(adata, library_key="field", tile_size=100)
    adata.write_h5ad(tmp_path / "tiles.h5ad")
    back = ad.read_h5ad(tmp_path / "tiles.h5ad")
    pd.testing.assert_series_equal(back.obs["tile"], adata.obs["tile"])
    spaformer_sc.pp.tile(back, tile_size=50)
    assert back.obs["tile"].nunique() == 9


def test_nothing_is_written_on_failure(adata):
    adata.obsm["spatial"][3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite for 1 of 420 cells: 'cell3'"):
        spaformer_sc.pp.tile(adata)
    assert list(adata.obs) == ["field"]
    assert not adata.uns


@pytest.mark.parametrize("order", ["as they are", "any"])
def test_edges_within_a_tile_are_those_of_the_graph(order):
    rng = np.random.default_rng(0)
    graph = spatial_graph(rng.random((600, 2)), method="knn", n_neighbors=6, radius=None)
    cells = rng.choice(600, 200, replace=False)
    cells = np.sort(cells) if order == "as they are" else cells
    place = np.full(600, -1)
    found, expected = _among(graph, cells, place), graph[cells][:, cells]
    assert 0 < found.nnz < graph.nnz
    for part in ("indptr", "indices", "data"):  # in the same order: sums over them are the same to the last digit
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    assert (place == -1).all()
