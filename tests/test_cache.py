"""Graphs and encodings are computed once for the same input, and anew for any other."""

from __future__ import annotations

import inspect
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc import _cache
from spaformer_sc._cache import Cache
from spaformer_sc.data import _graph
from spaformer_sc.data._graph import spatial_graph
from spaformer_sc.positional import laplacian, random_walk

pytestmark = pytest.mark.filterwarnings("ignore:`library_key` is None")
QUICK = {"quality": "fast", "max_epochs": 1, "progress": False}


def counted(function):
    """The function as another object, and the list of the arguments of its calls."""
    calls = []

    @wraps(function)
    def call(*args, **kwargs):
        calls.append(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return call, calls


@pytest.fixture
def calls(monkeypatch):
    """Calls of what the cache stands before, by name; none of it is known yet."""
    found = {}
    for module, name in [
        (_graph, "_graph"), (laplacian, "laplacian_eigenvectors"), (random_walk, "landing_probabilities"),
    ]:  # fmt: skip
        call, found[name] = counted(getattr(module, name))
        monkeypatch.setattr(module, name, call)
    return found


# --- the cache itself -------------------------------------------------------------------------------------------------

CSR = sp.csr_matrix(np.eye(3, dtype=np.float32))


def other_csr(part, values):
    changed = CSR.copy()
    setattr(changed, part, np.array(values, dtype=getattr(CSR, part).dtype))
    return changed


@pytest.mark.parametrize(
    "different",
    [
        [None, 0, 0.0, False, "", "None", np.int64(0), np.float32(0), np.zeros(()), ()],
        [1, 1.0, True, "1", np.ones(1), (1,), ((1,),), (1, 1)],
        [1.0, np.nextafter(1.0, 2)],
        [np.zeros(4), np.zeros(4, np.float32), np.zeros((2, 2)), np.zeros((4, 1)), np.zeros(5), np.zeros(4, ">f8")],
        [np.zeros(4), np.array([0, 0, 0, 1e-300]), torch.zeros(4, dtype=torch.float64)],
        [np.arange(4).reshape(2, 2), np.arange(4).reshape(2, 2).T],
        [(np.zeros(2), np.zeros(2)), (np.zeros(4),), (np.zeros(1), np.zeros(3))],
        [
            CSR,
            other_csr("data", [1, 1, 2]),
            other_csr("indices", [0, 1, 1]),
            other_csr("indptr", [0, 1, 1, 3]),
            CSR.astype(np.float64),
            sp.csr_matrix((CSR.data, CSR.indices, CSR.indptr), shape=(3, 4)),
        ],
    ],
)  # fmt: skip
def test_every_difference_of_an_argument_is_another_key(different):
    cache = Cache(10**9)
    function, calls = counted(lambda x, y=0: "result")
    for number, value in enumerate(different, start=1):
        for _ in range(2):
            assert cache(function, value) == "result"
        assert len(calls) == number
    cache(function, 7, different[0])
    cache(function, different[0], 7)
    cache(function, different[0], y=7)
    assert len(calls) == len(different) + 3


def test_equal_content_is_the_same_key_wherever_it_lies():
    cache = Cache(10**9)
    function, calls = counted(lambda x: 0)
    wide = np.arange(12.0).reshape(3, 4)
    for x in (wide[:, ::2], wide[:, ::2].copy(), np.asfortranarray(wide[:, ::2])):
        cache(function, x)
    assert len(calls) == 1
    again, calls_of_another = counted(lambda x: 0)
    cache(again, wide[:, ::2])
    assert len(calls_of_another) == 1


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), np.array([None]), sp.coo_matrix(CSR)])
def test_what_has_no_checksum_is_refused(value):
    cache = Cache(10**9)
    with pytest.raises(TypeError, match=type(value).__name__):
        cache(lambda x: 0, value)
    with pytest.raises(TypeError, match=type(value).__name__):
        cache(lambda: value)
    assert cache.n_bytes == 0


def test_nobody_changes_what_is_kept():
    cache = Cache(10**9)

    def make(seed):
        rng = np.random.default_rng(seed)
        graph = sp.random(5, 5, 0.5, "csr", random_state=rng)
        return rng.random(3), torch.from_numpy(rng.random(3)), graph, "and", None

    expected = make(0)
    for _ in range(3):
        array, tensor, graph, *rest = cache(make, 0)
        np.testing.assert_array_equal(array, expected[0])
        assert torch.equal(tensor, expected[1])
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(graph, part), getattr(expected[2], part))
        assert rest == ["and", None]
        array[:], tensor[:], graph.data[:], graph.indices[:] = -1, -1, -1, 0


def test_the_least_recently_used_is_forgotten_first_and_bytes_are_bounded():
    size = 10_000 + _cache._OVERHEAD
    cache = Cache(3 * size)
    function, calls = counted(lambda x: np.full(10_000, x, np.int8))
    for x in (1, 2, 3, 1, 4, 1, 3, 2):
        assert cache(function, x)[0] == x
        assert cache.n_bytes <= cache.capacity
    assert [call["x"] for call in calls] == [1, 2, 3, 4, 2]
    assert cache.n_bytes == 3 * size


def test_small_results_are_bounded_too():
    cache = Cache(100 * _cache._OVERHEAD)
    function, calls = counted(lambda x: 0)
    for x in range(1000):
        cache(function, x)
    assert len(cache._kept) == 100
    for x in range(900, 1000):
        cache(function, x)
    assert len(calls) == 1000


def test_a_result_larger_than_all_is_not_kept():
    cache = Cache(10_000)
    function, calls = counted(lambda x: np.zeros(x))
    cache(function, 1)
    for _ in range(2):
        assert len(cache(function, 10_000)) == 10_000
    cache(function, 1)
    assert [call["x"] for call in calls] == [1, 10_000, 10_000]


def test_a_failure_is_not_kept():
    cache = Cache(10**6)
    outcomes = [RuntimeError("once"), None]

    def function(x):
        if failure := outcomes.pop(0):
            raise failure
        return x

    with pytest.raises(RuntimeError, match="once"):
        cache(function, 1)
    assert cache(function, 1) == 1


def test_threads_may_ask_at_the_same_time():
    cache = Cache(5 * (800 + _cache._OVERHEAD))
    together = threading.Barrier(4)

    def function(x):
        return np.full(100, x, dtype=np.float64)

    def ask(seed):
        together.wait()
        for x in np.random.default_rng(seed).integers(12, size=400).tolist():
            found = cache(function, x)
            assert (found == x).all()
            found[:] = -1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert cache.n_bytes == 5 * (800 + _cache._OVERHEAD)
    assert len(cache._kept) == 5


def test_a_result_that_comes_twice_counts_once():
    cache = Cache(10**6)
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) == 1:
            cache(function, x)  # as another thread might, before this one is done
        return np.zeros(x)

    cache(function, 10)
    assert len(calls) == 2
    assert cache.n_bytes == 80 + _cache._OVERHEAD


# --- what it stands before --------------------------------------------------------------------------------------------


def test_fit_and_predictions_of_the_same_data_compute_once(tissue, calls):
    model = sf.SpaFormer(library_key="fov", positional=["laplacian", "random_walk"], **QUICK).fit(tissue)
    first = model.impute(tissue)
    tissue.layers["counts"] = tissue.X.copy()
    np.testing.assert_array_equal(model.impute(tissue, layer="counts"), first)
    model.embed(tissue)
    sf.SpaFormer(library_key="fov", positional=["signnet"], random_state=1, **QUICK).fit(tissue)
    assert {name: len(of) for name, of in calls.items()} == {
        "_graph": 3, "laplacian_eigenvectors": 3, "landing_probabilities": 3,
    }  # fmt: skip


def test_a_fit_to_some_fields_leaves_the_others_to_the_prediction(tissue, calls, monkeypatch):
    monkeypatch.setattr("spaformer_sc.model.FITTED_ENTRIES", 1)
    monkeypatch.setattr("spaformer_sc.model.LEAST_FITTED", 60)
    sf.tl.impute(tissue, library_key="fov", positional="laplacian", **QUICK)
    assert len(calls["_graph"]) == len(calls["laplacian_eigenvectors"]) == 3


def test_results_with_and_without_are_the_same(tissue, monkeypatch):
    def results():
        model = sf.SpaFormer(library_key="fov", positional=["signnet", "random_walk"], **QUICK).fit(tissue)
        return [model.impute(tissue), model.embed(tissue), model.impute(tissue)]

    def direct(function, *args):
        return function(*args)

    found = results()
    for module in (_graph, laplacian, random_walk):
        monkeypatch.setattr(module, "remembered", direct)
    for ours, theirs in zip(found, results(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "delaunay"},
        {"graph": "radius", "radius": 30.0},
        {"n_neighbors": 5},
        {"tile_size": 50, "library_key": None},
        {"library_key": None},
    ],
)
def test_another_graph_is_computed_anew(tissue, calls, change):
    usual = {"library_key": "fov", "positional": ["laplacian", "random_walk"], **QUICK}
    sf.SpaFormer(**usual).fit(tissue)
    before = {name: len(of) for name, of in calls.items()}
    sf.SpaFormer(**{**usual, **change}).fit(tissue)
    assert all(len(of) > before[name] for name, of in calls.items())


def test_one_moved_cell_changes_its_field_alone(tissue, calls):
    model = sf.SpaFormer(library_key="fov", positional="laplacian", **QUICK).fit(tissue)
    moved = np.flatnonzero(tissue.obs["fov"] == tissue.obs["fov"].iloc[0])[0]
    there = np.array(tissue.obsm["spatial"], dtype=np.float64)
    there[moved, 0] = np.nextafter(there[moved, 0], np.inf)
    tissue.obsm["spatial"] = there
    model.impute(tissue)
    assert len(calls["_graph"]) == 4
    assert len(calls["laplacian_eigenvectors"]) == 3  # the same neighbours
    there[moved] = there.max(axis=0) * 2
    tissue.obsm["spatial"] = there
    model.impute(tissue)
    assert len(calls["_graph"]) == 5
    assert len(calls["laplacian_eigenvectors"]) == 4


@pytest.mark.parametrize("name", ["laplacian", "random_walk"])
def test_another_number_of_columns_or_edge_is_computed_anew(name, calls):
    from spaformer_sc._geometric import Data
    from spaformer_sc.positional import build_positional

    (of,) = [calls[of] for of in calls if name in of or (name == "random_walk" and "landing" in of)]
    ring = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8])
    ring = torch.cat([ring, ring.flip(0)], 1)
    weight = torch.ones(16)
    heavier = torch.where((ring == 0).any(0), 2.0, 1.0)
    for number, (edges, n, weights, k) in enumerate(
        [
            (ring, 8, None, 3), (ring, 8, None, 4), (ring, 9, None, 3), (ring[:, (ring != 0).all(0)], 8, None, 3),
            (ring, 8, weight, 3), (ring, 8, heavier, 3),
        ],
        start=1,
    ):  # fmt: skip
        data = Data(edge_index=edges, num_nodes=n, edge_weight=weights)
        for _ in range(2):
            build_positional(name, 4, k=k).features(data)
        assert len(of) == number


def test_the_graph_given_out_is_no_part_of_the_cache():
    points = np.random.default_rng(0).random((40, 2))
    first = spatial_graph(points)
    kept = first.copy()
    first.data[:] = 0
    assert (spatial_graph(points) != kept).nnz == 0
    assert (spatial_graph(points + 1) != kept).nnz == 0


def test_what_is_wrong_with_a_field_is_said_every_time(caplog):
    line = np.stack([np.arange(20.0), np.arange(20.0)], 1)
    with caplog.at_level(logging.WARNING, logger="spaformer_sc"):
        graphs = [spatial_graph(line, method="delaunay") for _ in range(2)]
    assert caplog.text.count("have no Delaunay triangulation") == 2
    assert (graphs[0] != graphs[1]).nnz == 0
