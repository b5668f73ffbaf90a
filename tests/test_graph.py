"""Spatial graphs against brute force, and where squidpy by itself would fail."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from spaformer_sc.data._graph import _quiet, _symmetric, given_graph, n_components, spatial_graph, typical_distance

METHODS = [{"method": "knn"}, {"method": "delaunay"}, {"method": "radius", "radius": 0.2}]


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def nearest_by_hand(points, k):
    """Symmetrised nearest neighbours: one of two is among the k nearest of the other."""
    d = distances(points)
    np.fill_diagonal(d, np.inf)
    directed = np.zeros(d.shape, dtype=bool)
    for i, row in enumerate(d):
        directed[i, np.argsort(row)[:k]] = True
    return directed | directed.T


def delaunay_by_hand(points):
    """Edges of all triangles whose circumcircle holds no other point."""
    n = len(points)
    edges = np.zeros((n, n), dtype=bool)
    for triangle in itertools.combinations(range(n), 3):
        a, b, c = points[list(triangle)]
        centre = np.linalg.solve(2 * np.array([b - a, c - a]), np.array([b @ b - a @ a, c @ c - a @ a]))
        others = np.delete(points, triangle, axis=0)
        if np.all(np.linalg.norm(others - centre, axis=1) > np.linalg.norm(a - centre)):
            for i, j in itertools.permutations(triangle, 2):
                edges[i, j] = True
    return edges


def without_long_edges(edges, points, k=6, limit=3):
    d = distances(points)
    scale = np.sort(d, axis=1)[:, k]
    return edges & (d <= limit * np.maximum(scale[:, None], scale[None]))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (8, 6), (40, 1), (60, 6), (150, 10)])
def test_nearest_neighbours_against_brute_force(rng, n, k, n_axes):
    points = rng.normal(size=(n, n_axes)) * 100
    graph = spatial_graph(points, n_neighbors=k)
    np.testing.assert_array_equal(graph.toarray().astype(bool), nearest_by_hand(points, k))


@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("radius", [1e-6, 0.1, 0.4, 10])
def test_radius_against_brute_force(rng, radius, n_axes):
    points = rng.random((70, n_axes))
    expected = distances(points) <= radius
    np.fill_diagonal(expected, False)
    graph = spatial_graph(points, method="radius", radius=radius)
    np.testing.assert_array_equal(graph.toarray().astype(bool), expected)


def test_radius_includes_its_end():
    graph = spatial_graph(np.array([[0.0, 0], [3, 4], [3, 10]]), method="radius", radius=5)
    np.testing.assert_array_equal(graph.toarray(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("seed", range(5))
def test_delaunay_against_brute_force(seed):
    points = np.random.default_rng(seed).normal(size=(25, 2))
    points[:12, 0] += 14
    unlimited = delaunay_by_hand(points)
    expected = without_long_edges(unlimited, points)
    assert 0 < (unlimited & ~expected).sum() < unlimited.sum()
    np.testing.assert_array_equal(spatial_graph(points, method="delaunay").toarray().astype(bool), expected)


def test_delaunay_of_a_known_layout():
    points = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4], [2, 2]])
    expected = np.array([[0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(spatial_graph(points, method="delaunay").toarray(), expected)


@pytest.mark.parametrize("seed", range(3))
def test_delaunay_of_four_cells_around_a_square_has_one_diagonal(seed):
    points = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]) + np.random.default_rng(seed).normal(scale=0.05, size=(4, 2))
    graph = spatial_graph(points, method="delaunay")
    assert graph.nnz == 2 * 5
    np.testing.assert_array_equal(graph.toarray().astype(bool), delaunay_by_hand(points))


def test_an_edge_of_exactly_the_longest_length_is_kept():
    left = np.array([[0, 0], [-1, 0], [-0.5, 0.25], [-0.5, -0.25], [-0.75, 0.5], [-0.75, -0.5], [-0.25, 0.125]])
    for further, joined in ((0.0, 1), (2.0**-20, 0)):
        points = np.concatenate([left, np.array([3 + further, 0]) - left])
        assert np.sort(distances(points)[0])[6] == 1
        assert spatial_graph(points, method="delaunay")[0, 7] == joined


def test_delaunay_does_not_cross_a_gap(rng):
    patch = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(-1, 2)
    points = np.concatenate([patch, patch + np.array([20, 0])]) + rng.normal(scale=0.1, size=(128, 2))
    graph = spatial_graph(points, method="delaunay")
    number, label = connected_components(graph)
    assert number == 2
    np.testing.assert_array_equal(label, np.repeat([0, 1], 64))


def test_delaunay_keeps_sparse_tissue_beside_dense_tissue(rng):
    dense = np.stack(np.meshgrid(np.arange(30.0), np.arange(30.0)), axis=-1).reshape(-1, 2)
    loose = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), axis=-1).reshape(-1, 2) * 10 + np.array([35, 0])
    points = np.concatenate([dense, loose]) + rng.normal(scale=0.05, size=(916, 2))
    graph = spatial_graph(points, method="delaunay")
    assert n_components(graph) == 1
    assert typical_distance(points[900:], graph[900:, 900:]) > 9


@pytest.mark.parametrize("arguments", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 90])
def test_form(rng, arguments, n):
    points = rng.random((n, 2))
    before = points.copy()
    graph = spatial_graph(points, **arguments)
    assert isinstance(graph, sparse.csr_matrix)
    assert graph.shape == (n, n)
    assert graph.dtype == np.float32
    assert (graph.data == 1).all()
    assert graph.diagonal().sum() == 0
    assert (graph != graph.T).nnz == 0
    for row in range(n):
        assert (np.diff(graph.indices[graph.indptr[row] : graph.indptr[row + 1]]) > 0).all()
    np.testing.assert_array_equal(points, before)


@pytest.mark.parametrize("arguments", METHODS)
def test_order_of_cells_does_not_matter(rng, arguments):
    points = rng.random((80, 2))
    order = rng.permutation(80)
    graph = spatial_graph(points, **arguments)
    assert (spatial_graph(points[order], **arguments) != graph[order][:, order]).nnz == 0


@pytest.mark.parametrize("arguments", METHODS)
@pytest.mark.parametrize("n", [10, 80])
def test_place_of_the_origin_does_not_matter(rng, arguments, n):
    points = np.round(rng.random((n, 2)) * 2**20) / 2**20
    shifted = points + 2.0**30
    np.testing.assert_array_equal(shifted - 2.0**30, points)
    assert (spatial_graph(shifted, **arguments) != spatial_graph(points, **arguments)).nnz == 0


@pytest.mark.parametrize("method", ["knn", "delaunay"])
def test_every_cell_is_joined_to_its_nearest(rng, method):
    points = np.concatenate([rng.normal(size=(60, 2)), rng.normal(size=(20, 2)) * 50])
    d = distances(points)
    np.fill_diagonal(d, np.inf)
    graph = spatial_graph(points, method=method)
    assert (graph.toarray()[np.arange(80), d.argmin(axis=1)] == 1).all()


@pytest.mark.parametrize("n", range(1, 7))
def test_fewer_cells_than_neighbours_are_all_joined(rng, n):
    expected = ~np.eye(n, dtype=bool)
    np.testing.assert_array_equal(spatial_graph(rng.random((n, 2)), n_neighbors=6).toarray().astype(bool), expected)


@pytest.mark.parametrize(
    "points",
    [
        np.stack([np.arange(20.0) ** 1.1, np.zeros(20)], axis=1),
        np.stack([np.arange(20.0), np.arange(20.0)], axis=1),
        np.ones((9, 2)),
    ],
    ids=["axis", "diagonal", "one place"],
)
def test_without_a_triangulation_nearest_neighbours_are_used(points, caplog):
    with caplog.at_level(logging.WARNING, logger="spaformer_sc"):
        graph = spatial_graph(points, method="delaunay")
    assert "no Delaunay triangulation" in caplog.text
    assert (graph != spatial_graph(points)).nnz == 0
    assert (np.asarray(graph.sum(axis=1)) >= 6).all()


@pytest.mark.parametrize("n", [2, 3])
def test_a_single_simplex_needs_no_warning(rng, n, caplog):
    graph = spatial_graph(rng.random((n, 2)), method="delaunay")
    np.testing.assert_array_equal(graph.toarray(), 1 - np.eye(n))
    assert caplog.text == ""


@pytest.mark.parametrize("arguments", METHODS)
def test_cells_in_a_plane_need_no_warning(rng, arguments, caplog):
    spatial_graph(rng.random((30, 2)), **arguments)
    spatial_graph(np.ones((9, 2)))
    assert caplog.text == ""


def test_a_constant_third_axis_is_ignored(rng):
    points = rng.random((50, 2))
    flat = np.column_stack([points, np.full(50, 7.0)])
    for method in ("knn", "delaunay"):
        assert (spatial_graph(flat, method=method) != spatial_graph(points, method=method)).nnz == 0


def test_delaunay_leaves_no_cell_out_that_shares_its_place(rng):
    points = rng.random((50, 2))
    graph = spatial_graph(np.concatenate([points, points[:5], points[:5]]), method="delaunay")
    assert (np.diff(graph.indptr) > 0).all()
    assert n_components(graph) == 1


def test_a_directed_graph_with_loops_is_made_symmetric():
    directed = np.array([[2.0, 0, 0.5, 0], [0, 0, 0, 0], [0, 3, 1, 0], [0, 0, 0, 1]])
    expected = np.array([[0.0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    graph = _symmetric(sparse.csr_matrix(directed))
    np.testing.assert_array_equal(graph.toarray(), expected)
    assert graph.nnz == 4


@pytest.mark.parametrize("arguments", [{"method": "radius", "radius": 0.5}, {"n_neighbors": 1}])
def test_cells_in_one_place_are_neighbours(arguments):
    points = np.array([[0.0, 0], [0, 0], [3, 0], [3, 0]])
    expected = np.kron(np.eye(2), 1 - np.eye(2))
    np.testing.assert_array_equal(spatial_graph(points, **arguments).toarray(), expected)


def test_squidpy_may_still_warn():
    squidpy_logger, heard = logging.getLogger("spatialdata._logging"), []
    handler = logging.Handler()
    handler.emit = heard.append
    squidpy_logger.addHandler(handler)
    try:
        with _quiet():
            for level in (logging.INFO, logging.WARNING):
                squidpy_logger.log(level, "of a graph")
    finally:
        squidpy_logger.removeHandler(handler)
    assert [record.levelno for record in heard] == [logging.WARNING]


def test_squidpy_prints_nothing_and_is_left_as_it_was(rng, capfd):
    spatial_graph(rng.random((20, 2)))
    out, err = capfd.readouterr()
    assert out + err == ""
    assert logging.getLogger("spatialdata._logging").filters == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "grid"}, ValueError, "`method='grid'`"),
        ({"n_neighbors": 0}, ValueError, "`n_neighbors=0`"),
        ({"n_neighbors": 2.5}, TypeError, "`n_neighbors=2.5`"),
        ({"method": "radius"}, ValueError, "`radius=None`"),
        ({"method": "radius", "radius": -1}, ValueError, "`radius=-1`"),
        ({"method": "knn", "radius": 3.0}, ValueError, "only used by method='radius'"),
    ],
)
def test_bad_arguments(rng, arguments, error, message):
    with pytest.raises(error, match=message):
        spatial_graph(rng.random((9, 2)), **arguments)


def test_given_graph(caplog):
    weights = np.array([[5.0, 0.2, 0, 0.9], [0.7, 0, 0, 0], [0, 0, 0, 0.4], [0, 0, 0.1, 0]])
    given = sparse.csr_matrix(weights)
    graph = given_graph(given, np.array([0, 0, 1, 1]))
    expected = np.array([[0, 0.7, 0, 0], [0.7, 0, 0, 0], [0, 0, 0, 0.4], [0, 0, 0.4, 0]], dtype=np.float32)
    np.testing.assert_array_equal(graph.toarray(), expected)
    assert graph.nnz == 4
    assert graph.dtype == np.float32
    np.testing.assert_array_equal(given.toarray(), weights)
    assert "1 edges of the given graph join cells of different fields" in caplog.text


@pytest.mark.parametrize("form", [np.asarray, sparse.csc_matrix, sparse.coo_matrix, sparse.csr_array])
@pytest.mark.parametrize("dtype", [bool, np.int64, np.float64])
def test_given_graph_in_any_form(rng, form, dtype, caplog):
    weights = (rng.random((12, 12)) < 0.3).astype(dtype)
    graph = given_graph(form(weights), np.zeros(12, dtype=np.int64))
    both = (weights | weights.T) if dtype is bool else np.maximum(weights, weights.T)
    np.testing.assert_array_equal(graph.toarray(), both * ~np.eye(12, dtype=bool))
    assert caplog.text == ""


def test_given_graph_without_edges_between_fields_is_the_graph_of_each_field(rng):
    points = rng.random((60, 2))
    codes = np.repeat([0, 1, 2], 20)
    graph = given_graph(spatial_graph(points), codes)
    assert all((graph[codes == i][:, codes != i]).nnz == 0 for i in range(3))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((3, 4)), "its shape is \\(3, 4\\)"),
        (np.ones((4, 4)), "3 × 3"),
        (np.array([[0, -1, 0], [0, 0, 0], [0, 0, 0.0]]), "1 negative"),
        (np.array([[0, np.nan, 0], [0, 0, np.inf], [0, 0, 0.0]]), "2 weights that are NaN or infinite"),
    ],
)
def test_bad_given_graph(weights, message):
    with pytest.raises(ValueError, match=message):
        given_graph(weights, np.zeros(3, dtype=np.int64))


def test_typical_distance():
    points = np.array([[0.0, 0], [1, 0], [1, 3], [11, 3], [11, 3]])
    graph = given_graph(np.eye(5, k=1), np.zeros(5, dtype=np.int64))
    assert typical_distance(points, graph) == 3
    assert typical_distance(points * 0.18, graph) == pytest.approx(3 * 0.18)


def test_typical_distance_without_one():
    alone = sparse.csr_matrix((3, 3), dtype=np.float32)
    assert typical_distance(np.zeros((3, 2)), alone) == 1
    assert typical_distance(np.zeros((9, 2)), spatial_graph(np.zeros((9, 2)))) == 1


def test_number_of_components():
    assert n_components(sparse.csr_matrix((4, 4), dtype=np.float32)) == 4
    assert n_components(sparse.csr_matrix(np.kron(np.eye(3), np.ones((2, 2))))) == 3
