"""Positional encodings: what each does not depend on, distances, torn graphs, other slides; features in `obsm`."""

from __future__ import annotations

import random
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import Tensor
from torch_geometric.data import Data

import spaformer_sc as sf
from spaformer_sc._config import resolve
from spaformer_sc.data._graph import spatial_graph, typical_distance
from spaformer_sc.positional import (
    POSITIONAL,
    FourierEncoding,
    PositionalEncoding,
    SinusoidalEncoding,
    build_positional,
    landing_probabilities,
    random_walk,
)
from tests.conftest import contents

GRAPH = ("laplacian", "signnet", "random_walk")
COORDINATE = ("patch", "linear", "mlp", "sinusoidal", "fourier")
DIM, K = 12, 6
WIDTH = {"patch": 2, "linear": 2, "mlp": 2, "sinusoidal": 4 * K, "fourier": 2 * K}


def scattered(n: int, seed: int = 0) -> np.ndarray:
    """Cells scattered evenly, one in a unit square, off the origin."""
    return np.random.default_rng(seed).random((n, 2)) * np.sqrt(n) + np.array([30, -8])


def rotated(points: np.ndarray, degrees: float = 30) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def cells(points: np.ndarray, **obs: object) -> ad.AnnData:
    names = [f"c{i}" for i in range(len(points))]
    frame = pd.DataFrame(obs, index=names)
    return ad.AnnData(np.ones((len(points), 1), dtype=np.float32), obs=frame, obsm={"spatial": points})


def shown(points: np.ndarray, name: str, **arguments: object) -> np.ndarray:
    result = sf.pp.positional_encoding(cells(points), name, k=K, copy=True, **arguments)
    return result.obsm[f"X_pe_{name}"]


def fov(points: np.ndarray) -> Data:
    """A FOV as the model prepares it."""
    graph = spatial_graph(points)
    pos = (points - points.mean(0)) / typical_distance(points, graph)
    edges = np.stack(graph.tocoo().coords).astype(np.int64)
    return Data(edge_index=torch.from_numpy(edges), pos=torch.from_numpy(pos).float(), num_nodes=len(points))


def at(*points: tuple[float, float]) -> Data:
    """Cells without edges, at positions in typical distances."""
    return Data(edge_index=torch.empty(2, 0, dtype=torch.int64), pos=torch.tensor(points), num_nodes=len(points))


def make(name: str, k: int = K, seed: int = 0) -> PositionalEncoding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return POSITIONAL[name](DIM, k).eval()


def close(actual: object, expected: object, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


# --- symmetries -------------------------------------------------------------------------------------------------------


def test_every_encoding_is_of_one_kind() -> None:
    assert set(GRAPH) | set(COORDINATE) == set(POSITIONAL)
    assert [name for name in POSITIONAL if POSITIONAL[name].needs_graph] == ["signnet"]


@pytest.mark.parametrize("name", POSITIONAL)
def test_origin_and_unit_of_coordinates_do_not_matter(name: str) -> None:
    points = scattered(150)
    expected = shown(points, name)
    assert np.ptp(expected, axis=0).max() > 0.05
    close(shown(points + np.array([1e4, -3e3]), name), expected)
    close(shown(points * 0.12, name), expected)
    close(shown(points * 1e5, name), expected)


@pytest.mark.parametrize("name", POSITIONAL)
@pytest.mark.parametrize("change", ["rotation", "reflection"])
def test_rotation_and_reflection(name: str, change: str) -> None:
    points = scattered(150)
    moved = rotated(points) if change == "rotation" else points * [-1, 1]
    before, after = shown(points, name), shown(moved, name)
    if name in GRAPH:
        close(after, before)
    else:
        assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("change", ["rotation", "reflection"])
def test_signnet_itself_does_not_depend_on_rotation_and_reflection(change: str) -> None:
    points, module = scattered(150), make("signnet")
    before, after = fov(points), fov(rotated(points) if change == "rotation" else points * [-1, 1])
    with torch.no_grad():
        close(module(module.features(after), after.edge_index), module(module.features(before), before.edge_index))


@pytest.mark.parametrize("name", POSITIONAL)
def test_permuting_cells_permutes_features(name: str) -> None:
    points = scattered(120)
    order = np.random.default_rng(1).permutation(120)
    close(shown(points[order], name), shown(points, name)[order])


@pytest.mark.parametrize("name", POSITIONAL)
def test_features_are_deterministic_and_leave_random_states_alone(name: str) -> None:
    points = scattered(300)
    states = np.random.get_state()[1].copy(), torch.random.get_rng_state(), random.getstate()  # noqa: NPY002
    expected = shown(points, name)
    assert np.array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert random.getstate() == states[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert np.array_equal(shown(points, name), expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(POSITIONAL[name](DIM, K).features(fov(points)).values() for _ in range(2)))
        )


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_scaled_positions_keep_distances(name: str) -> None:
    points = scattered(80)
    unit = typical_distance(points, spatial_graph(points))
    values = shown(points, name)
    close(values, (points - points.mean(0)) / (30 * unit), 1e-6)
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    close(30 * unit * np.linalg.norm(values[:, None] - values, axis=2), distance, 1e-4)


def test_inner_products_of_sinusoids_depend_on_displacement_alone() -> None:
    module = SinusoidalEncoding(DIM, K)
    rng = np.random.default_rng(0)
    start = torch.from_numpy(rng.uniform(-100, 100, (200, 2))).float()
    wavelengths = np.geomspace(4, 1000, K)
    for displacement in ([3.0, 0.0], [-1.0, 2.0], [40.0, 25.0]):
        products = (module.basis(start) * module.basis(start + torch.tensor(displacement))).sum(1)
        expected = sum(np.cos(2 * np.pi * np.array(displacement) / wavelength).sum() for wavelength in wavelengths)
        close(products, np.full(200, expected), 1e-3)


def test_inner_products_of_sinusoids_do_not_depend_on_reflection_but_on_direction() -> None:
    module = SinusoidalEncoding(DIM, K)

    def product(x: float, y: float) -> float:
        return float((module.basis(torch.tensor([[x, y]])) * module.basis(torch.zeros(1, 2))).sum())

    assert product(5, 3) == pytest.approx(product(-5, 3), abs=1e-4)
    assert product(5, 3) == pytest.approx(product(3, 5), abs=1e-4)
    assert abs(product(5, 0) - product(5 / np.sqrt(2), 5 / np.sqrt(2))) > 0.1


@pytest.mark.parametrize("k", [1, 2, 10])
def test_wavelengths_are_geometric(k: int) -> None:
    wavelengths = 2 * np.pi / SinusoidalEncoding(DIM, k).frequencies.numpy()
    assert wavelengths[0] == pytest.approx(4)
    if k > 1:
        assert wavelengths[-1] == pytest.approx(1000)
        close(wavelengths[1:] / wavelengths[:-1], np.full(k - 1, 250 ** (1 / (k - 1))), 1e-3)


@pytest.mark.parametrize("k", [200, 20_000])
def test_fourier_features_approximate_a_gaussian_kernel(k: int) -> None:
    """Of the stated bandwidth, whatever the direction, with the stated standard error."""
    module = FourierEncoding(DIM, k)
    length = np.tile(np.arange(0, 40, 2.0), 24)
    angle = np.repeat(np.linspace(0, 2 * np.pi, 24, endpoint=False), 20)
    displacement = np.stack([length * np.cos(angle), length * np.sin(angle)], 1)
    origin = torch.tensor([[7.0, -20.0]])
    products = (module.basis(origin + torch.from_numpy(displacement).float()) * module.basis(origin)).sum(1) / k
    error = products.numpy() - np.exp(-(length**2) / (2 * 10**2))
    assert np.sqrt(np.mean(error**2)) < 1.5 / np.sqrt(2 * k)


def test_fourier_kernel_of_a_tissue_hardly_depends_on_rotation_and_reflection() -> None:
    points, module = scattered(60), FourierEncoding(DIM, 20_000)

    def kernel(moved: np.ndarray) -> Tensor:
        basis = module.basis(fov(moved).pos)
        return basis @ basis.T / 20_000

    close(kernel(rotated(points)), kernel(points), 0.05)
    close(kernel(points * [-1, 1]), kernel(points), 0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_fourier_frequencies_are_fixed_and_saved(seed: int) -> None:
    module, other = make("fourier"), make("fourier", seed=seed + 5)
    assert torch.equal(module.frequencies, other.frequencies)
    assert not torch.equal(module.learned.weight, other.learned.weight)
    state = other.state_dict()
    state["frequencies"] = state["frequencies"] * 2
    module.load_state_dict(state)
    features = {"position": torch.rand(5, 2)}
    torch.testing.assert_close(module(features), other({"position": features["position"] * 2}))


def test_bins_of_a_grid() -> None:
    """Row from y, column from x, 10 typical distances wide, the centre in the middle of one, clamped outside."""
    data = at((0, 0), (4.9, -4.9), (5.1, -5.1), (-14.9, 24.9), (164, -164), (166, -166), (1e6, -1e6))
    expected = [[16, 16], [16, 16], [15, 17], [18, 15], [0, 32], [0, 32], [0, 32]]
    assert make("patch").features(data)["patch"].tolist() == expected


def test_patches_know_bins_and_nothing_else() -> None:
    module = make("patch")
    encoded = module(module.features(at((-4, -4), (4, 4), (6, 4))))
    assert torch.equal(encoded[0], encoded[1])
    assert not torch.equal(encoded[1], encoded[2])
    assert module.embedding.weight.std() < 0.03
    every = torch.cartesian_prod(torch.arange(33), torch.arange(33))
    assert len(module({"patch": every}).unique(dim=0)) == 33 * 33


def test_smooth_eigenvectors_are_alike_in_nearby_cells() -> None:
    points = scattered(400)
    vectors = shown(points, "laplacian")[:, :3]
    distance = np.linalg.norm(points[:, None] - points, axis=2).ravel()
    apart = np.linalg.norm(vectors[:, None] - vectors, axis=2).ravel()
    assert np.corrcoef(distance, apart)[0, 1] > 0.6


def test_random_walk_knows_no_distance() -> None:
    """All cells of a ring look alike, and in a tissue a cell's likeness says nothing of its distance."""
    n = 50
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    probabilities = landing_probabilities(torch.cat([ring, ring.flip(0)], 1), n, K)
    close(probabilities, np.tile(probabilities[0], (n, 1)), 1e-6)
    points = scattered(400)
    values = shown(points, "random_walk")
    far = np.linalg.norm(points[:, None] - points, axis=2).ravel()
    apart = np.linalg.norm(values[:, None] - values, axis=2).ravel()
    distant = far > 5
    assert abs(np.corrcoef(far[distant], apart[distant])[0, 1]) < 0.15


# --- graphs that fall apart, small fields, other slides ---------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH)
def test_components_are_encoded_as_if_alone(name: str) -> None:
    parts = [fov(scattered(40)), fov(scattered(25, 1)), at((0.0, 0.0)), fov(scattered(3, 2))]
    starts = np.cumsum([0, *(part.num_nodes for part in parts)])
    edges = torch.cat([part.edge_index + int(start) for part, start in zip(parts, starts)], 1)
    module = make(name)
    with torch.no_grad():
        together = module(module.features(Data(edge_index=edges, num_nodes=int(starts[-1]))), edges)
        alone = torch.cat([module(module.features(part), part.edge_index) for part in parts])
    close(together, alone)


@pytest.mark.parametrize("name", COORDINATE)
def test_coordinate_encodings_do_not_see_the_graph(name: str) -> None:
    module, data = make(name), fov(scattered(40))
    torn = Data(edge_index=data.edge_index[:, :10], pos=data.pos, num_nodes=40)
    expected, features = module.features(data), module.features(torn)
    assert all(torch.equal(features[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", POSITIONAL)
@pytest.mark.parametrize(
    "points", [scattered(1), np.zeros((1, 2)), scattered(2), np.ones((9, 2)), scattered(3)[[0, 0, 1, 2]]]
)
def test_smallest_fields(name: str, points: np.ndarray) -> None:
    values = shown(points, name)
    assert values.shape == (len(points), WIDTH.get(name, K))
    assert np.isfinite(values).all()
    if len(points) == 1:
        centre = {"patch": [16, 16], "sinusoidal": [0] * 2 * K + [1] * 2 * K, "fourier": [1] * K + [0] * K}
        assert values[0].tolist() == centre.get(name, [0] * values.shape[1])
    data, module = fov(points), make(name)
    assert torch.isfinite(module(module.features(data), data.edge_index)).all()


@pytest.mark.parametrize("name", POSITIONAL)
def test_a_field_is_encoded_whatever_other_fields_there_are(name: str) -> None:
    """Names of fields start again on every slide; coordinates of fields overlap; cells are mixed."""
    parts = [scattered(70), scattered(40, 1) * 3, scattered(1, 2), scattered(55, 3) + 500]
    order = np.random.default_rng(0).permutation(166)
    sizes = [len(part) for part in parts]
    obs = {
        "slide": pd.Categorical(np.repeat(["a", "a", "b", "b"], sizes)[order]),
        "fov": pd.Categorical(np.repeat(["1", "2", "1", "2"], sizes)[order]),
    }
    adata = cells(np.concatenate(parts)[order], **obs)
    sf.pp.positional_encoding(adata, name, library_key=["slide", "fov"], k=K)
    values = np.empty_like(adata.obsm[f"X_pe_{name}"])
    values[order] = adata.obsm[f"X_pe_{name}"]
    for part, found in zip(parts, np.split(values, np.cumsum(sizes)[:-1])):
        close(found, shown(part, name))


@pytest.mark.parametrize("name", ["patch", "mlp", "sinusoidal", "fourier", "linear"])
def test_coordinates_beyond_those_of_training(name: str) -> None:
    module, far = make(name), at((2e4, -3e4), (4e4, -6e4))
    with torch.no_grad():
        encoded = module(module.features(far))
    assert torch.isfinite(encoded).all()
    if name == "patch":
        assert torch.equal(encoded[0], encoded[1])
    elif name in ("sinusoidal", "fourier"):
        assert module.basis(far.pos).abs().max() <= 1
    else:
        growth = encoded[1].norm() / encoded[0].norm()
        assert growth == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("n", [30, 300, 1200])
def test_features_of_graphs_keep_their_scale_with_size(n: int) -> None:
    points = scattered(n)
    close(np.square(shown(points, "laplacian")).mean(0), np.ones(K), 1e-4)
    walk = shown(points, "random_walk")
    assert walk.min() >= 0
    assert walk.max() <= 1


def test_no_encoding_is_none() -> None:
    chosen = resolve(
        preset="default", quality="default", positional=None, encoder="auto", decoder="auto", variational=False,
        masking="auto", n_latent=None, max_epochs=None,
    )  # fmt: skip
    assert chosen.positional == ()


# --- random walks -----------------------------------------------------------------------------------------------------


def dense_walk(adjacency: np.ndarray, k: int) -> np.ndarray:
    degree = adjacency.sum(0)
    step = adjacency / np.where(degree > 0, degree, 1)
    return np.stack([np.diag(np.linalg.matrix_power(step, power)) for power in range(1, k + 1)], 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("n", [1, 2, 30, 150])
def test_landing_probabilities_against_dense_powers(
    n: int, k: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_walk, "_ROWS", 64)
    graph = sparse.lil_array(spatial_graph(scattered(n)))
    graph[n // 2] = 0
    graph[:, [n // 2]] = 0  # a cell without neighbours
    graph = graph.tocoo()
    edges = torch.from_numpy(np.stack(graph.coords).astype(np.int64))
    low, high = edges.min(0).values, edges.max(0).values
    weight = 0.2 + ((low * 7 + high * 13) % 10).float() if weighted else torch.ones(edges.shape[1])
    dense = np.zeros((n, n))
    dense[edges[0], edges[1]] = weight
    result = landing_probabilities(edges, n, k, weight if weighted else None)
    assert result.dtype == torch.float32
    close(result, dense_walk(dense, k), 1e-6)
    assert (result[n // 2] == 0).all()
    data = Data(edge_index=edges, edge_weight=weight if weighted else None, num_nodes=n)
    assert torch.equal(make("random_walk", k).features(data)["landing_probabilities"], result)


def test_landing_probabilities_that_are_known() -> None:
    triangle = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]])
    close(landing_probabilities(triangle, 3, 4), [[0, 1 / 2, 1 / 4, 3 / 8]] * 3, 1e-7)
    pair = torch.tensor([[0, 1], [1, 0]])
    close(landing_probabilities(pair, 2, 4), [[0, 1, 0, 1]] * 2, 1e-7)


def test_walks_of_no_step_are_refused() -> None:
    with pytest.raises(ValueError, match="`k=0` must be at least 1: the number of steps"):
        landing_probabilities(torch.empty(2, 0, dtype=torch.int64), 1, 0)


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POSITIONAL)
def test_gradients_reach_all_learned_parts(name: str) -> None:
    module, data = make(name).train(), fov(scattered(30))
    features = module.features(data)
    assert not any(feature.requires_grad for feature in features.values())
    module(features, data.edge_index).square().sum().backward()
    assert list(module.parameters())
    for parameter in module.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", POSITIONAL)
def test_features_have_their_names_and_the_encoding_its_shape(name: str) -> None:
    module, data = make(name), fov(scattered(30))
    features = module.features(data)
    assert tuple(features) == module.feature_names
    assert all(len(feature) == 30 for feature in features.values())
    assert module(features, data.edge_index).shape == (30, DIM)


def test_all_encodings_can_be_summed() -> None:
    module, data = build_positional(list(POSITIONAL), DIM, k=K).eval(), fov(scattered(30))
    features = module.features(data)
    assert len(features) == 6  # three of the Laplacian's, probabilities, bins, and one of all coordinate encodings
    parts = [encoding(encoding.features(data), data.edge_index) for encoding in module]
    torch.testing.assert_close(module(features, data.edge_index), torch.stack(parts).sum(0))
    assert not build_positional([name for name in POSITIONAL if name != "signnet"], DIM).needs_graph


@pytest.mark.parametrize("name", COORDINATE)
def test_rows_are_encoded_by_themselves(name: str) -> None:
    module, data = make(name), fov(scattered(30))
    features = module.features(data)
    some = {key: feature[5:9] for key, feature in features.items()}
    torch.testing.assert_close(module(some), module(features)[5:9])


@pytest.mark.parametrize("name", ["sinusoidal", "fourier"])
def test_phases_are_exact_far_out_and_under_autocast(name: str) -> None:
    module = make(name)
    position = torch.tensor([[480.3, -391.7], [12.5, 500.0]])
    expected = module.double().basis(position.double())
    module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(module.basis(position), expected, 1e-3)


@pytest.mark.parametrize("name", COORDINATE)
def test_missing_positions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"`data.pos` is None, but this encoding needs the positions"):
        make(name).features(Data(edge_index=torch.empty(2, 0, dtype=torch.int64), num_nodes=3))


# --- sf.pp.positional_encoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POSITIONAL)
def test_what_is_written(name: str, tissue: ad.AnnData) -> None:
    """The first feature of each field, or the basis of it, in the rows of its cells; everything else as it was."""
    before = contents(tissue)
    assert sf.pp.positional_encoding(tissue, name, library_key="fov", k=K) is None
    key = f"X_pe_{name}"
    values = tissue.obsm[key]
    assert type(values) is np.ndarray
    assert (values.dtype, values.shape) == (np.float32, (tissue.n_obs, WIDTH.get(name, K)))
    module = make(name)
    for field in tissue.obs["fov"].unique():
        here = np.flatnonzero(tissue.obs["fov"] == field)
        first = module.features(fov(tissue.obsm["spatial"][here]))[module.feature_names[0]]
        close(values[here], module.basis(first) if hasattr(module, "basis") else first)
    assert tissue.uns[key]["params"] == {
        "encoding": name, "library_key": ["fov"], "spatial_key": "spatial", "connectivity_key": None,
        "n_neighbors": 6, "k": K,
    }  # fmt: skip
    del tissue.obsm[key], tissue.uns[key]
    assert contents(tissue) == before


def test_number_of_neighbours_and_given_graphs(tissue: ad.AnnData) -> None:
    """A graph that is given is used, but for edges between fields; its weights are not."""
    codes = tissue.obs["fov"].cat.codes.to_numpy()
    sf.pp.positional_encoding(tissue, "random_walk", library_key="fov", n_neighbors=9)
    graph = sparse.lil_array((tissue.n_obs, tissue.n_obs), dtype=np.float32)
    for code in range(3):
        here = np.flatnonzero(codes == code)
        graph[np.ix_(here, here)] = 0.5 * spatial_graph(tissue.obsm["spatial"][here], n_neighbors=9).toarray()
    across = np.flatnonzero(codes == 0)[0], np.flatnonzero(codes == 1)[0]
    graph[across] = graph[across[::-1]] = 1
    tissue.obsp["mine"] = sparse.csr_matrix(graph)
    sf.pp.positional_encoding(tissue, "random_walk", library_key="fov", connectivity_key="mine", key_added="with_mine")
    close(tissue.obsm["with_mine"], tissue.obsm["X_pe_random_walk"], 1e-6)
    sf.pp.positional_encoding(tissue, "random_walk", library_key="fov", key_added="default")
    assert np.abs(tissue.obsm["default"] - tissue.obsm["with_mine"]).max() > 0.01


def test_large_fields_are_not_cut() -> None:
    points = np.random.default_rng(0).random((7000, 2)) * 80
    values = shown(points, "linear")
    close(values.mean(0), [0, 0], 1e-5)
    data = fov(points)
    close(shown(points, "random_walk"), landing_probabilities(data.edge_index, 7000, K), 1e-6)


def test_third_axis_is_left_out() -> None:
    flat = scattered(60)
    close(shown(np.c_[flat, np.full(60, 3.0)], "linear"), shown(flat, "linear"))


def test_copy_view_and_frame(tissue: ad.AnnData) -> None:
    before = contents(tissue)
    copied = sf.pp.positional_encoding(tissue, "fourier", library_key="fov", copy=True)
    assert contents(tissue) == before
    view = tissue[tissue.obs["fov"] == tissue.obs["fov"].iloc[0]]
    rows = tissue.obs_names.get_indexer(view.obs_names)
    sf.pp.positional_encoding(view, "fourier")
    close(view.obsm["X_pe_fourier"], copied.obsm["X_pe_fourier"][rows])
    assert contents(tissue) == before
    tissue.obsm["frame"] = pd.DataFrame(tissue.obsm["spatial"], index=tissue.obs_names, columns=["x", "y"])
    sf.pp.positional_encoding(tissue, "fourier", library_key="fov", spatial_key="frame")
    close(tissue.obsm["X_pe_fourier"], copied.obsm["X_pe_fourier"], 1e-6)


def test_own_result_is_replaced_and_survives_a_file(tissue: ad.AnnData, tmp_path: object) -> None:
    sf.pp.positional_encoding(tissue, "linear", library_key="fov", key_added="where")
    sf.pp.positional_encoding(tissue, "sinusoidal", library_key="fov", key_added="where", k=2)
    assert tissue.obsm["where"].shape == (tissue.n_obs, 8)
    tissue.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert np.array_equal(back.obsm["where"], tissue.obsm["where"])
    sf.pp.positional_encoding(back, "patch", library_key="fov", key_added="where")
    assert back.obsm["where"].shape == (tissue.n_obs, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "fourrier"}, ValueError, "`name='fourrier'` is not allowed.*Did you mean 'fourier'"),
        ({"name": ["fourier"]}, ValueError, r"`name=\['fourier'\]` is not allowed"),
        ({"k": 0}, ValueError, "`k=0` must be at least 1"),
        ({"k": 2.5}, TypeError, "`k=2.5` must be a whole number"),
        ({"n_neighbors": 0}, ValueError, "`n_neighbors=0` must be at least 1"),
        ({"copy": 1}, TypeError, "`copy=1` must be True or False"),
        ({"library_key": "FOV"}, KeyError, "`library_key='FOV'` is not in `adata.obs`.*Did you mean 'fov'"),
        ({"spatial_key": "where"}, KeyError, "`spatial_key='where'` is not in `adata.obsm`"),
        ({"connectivity_key": "mine"}, KeyError, "`connectivity_key='mine'` is not in `adata.obsp`"),
        ({"key_added": "a/b"}, ValueError, "`key_added='a/b'` cannot be written"),
        ({"key_added": "X_mine"}, ValueError, "would overwrite adata.obsm"),
        ({"key_added": "spatial"}, ValueError, "would overwrite adata.obsm"),
        ({"key_added": "X_own", "spatial_key": "X_own"}, ValueError, "is also `spatial_key`"),
        ({"spatial_key": "X_nan"}, ValueError, "is NaN or infinite for 1 of"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_changed(
    tissue: ad.AnnData, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    tissue.obsm["X_mine"] = np.ones((tissue.n_obs, 2))
    tissue.obsm["X_nan"] = tissue.obsm["spatial"].copy()
    tissue.obsm["X_nan"][3, 1] = np.nan
    sf.pp.positional_encoding(tissue, "linear", library_key="fov", key_added="X_own")
    before = contents(tissue)
    with pytest.raises(error, match=message):
        sf.pp.positional_encoding(tissue, **{"name": "fourier", "library_key": "fov", **arguments})
    assert contents(tissue) == before


def test_a_failure_on_the_way_changes_nothing(tissue: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tissue)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(random_walk, "landing_probabilities", fail)
    with pytest.raises(MemoryError):
        sf.pp.positional_encoding(tissue, "random_walk", library_key="fov")
    assert contents(tissue) == before


def test_pp_is_light() -> None:
    code = (
        "import spaformer_sc.pp, sys; print([m for m in ('torch', 'squidpy', 'torch_geometric') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
