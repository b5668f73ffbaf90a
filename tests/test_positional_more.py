"""Positional encodings: every claim of the tables in the docs; random walks; features in `obsm`."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import Tensor

import spaformer_sc as sf
from spaformer_sc._config import resolve
from spaformer_sc._geometric import Data
from spaformer_sc.data._graph import spatial_graph, typical_distance
from spaformer_sc.nn.network import Positions
from spaformer_sc.positional import (
    POSITIONAL,
    CombinedEncodings,
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
CONDITIONAL = ("conditional", "conditional_gat")
FIXED = (*GRAPH, *COORDINATE)
DIM, K, M, G = 12, 6, 7, 8
WIDTH = {"patch": 2, "linear": 2, "mlp": 2, "sinusoidal": 4 * K, "fourier": 2 * M}
DOCS = Path(__file__).resolve().parents[1] / "docs" / "positional_encodings.md"


def scattered(n: int, seed: int = 0) -> np.ndarray:
    """Cells scattered evenly, one in a unit square, off the origin."""
    return np.random.default_rng(seed).random((n, 2)) * np.sqrt(n) + np.array([30, -8])


def rotated(points: np.ndarray, degrees: float = 30) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def cells(points: np.ndarray, **obs: object) -> ad.AnnData:
    names = [f"c{i}" for i in range(len(points))]
    frame = pd.DataFrame(obs, index=names)
    counts = np.random.default_rng(0).poisson(2.0, (len(points), G)).astype(np.float32) + np.eye(1, G, dtype=np.float32)
    return ad.AnnData(counts, obs=frame, obsm={"spatial": points})


def shown(points: np.ndarray, name: str, **arguments: object) -> np.ndarray:
    arguments = {"k": K, "n_frequencies": M, **arguments}
    result = sf.pp.positional_encoding(cells(points), name, copy=True, **arguments)
    return result.obsm[f"X_pe_{name}"]


def fov(points: np.ndarray) -> Data:
    """A FOV as the model prepares it."""
    graph = spatial_graph(points)
    pos = (points - points.mean(0)) / typical_distance(points, graph)
    edges = np.stack(graph.tocoo().coords).astype(np.int64)
    unit = typical_distance(points, graph)
    return Data(edge_index=torch.from_numpy(edges), pos=torch.from_numpy(pos).float(), unit=unit, num_nodes=len(points))


def at(*points: tuple[float, float]) -> Data:
    """Cells without edges, at positions in typical distances."""
    return Data(edge_index=torch.empty(2, 0, dtype=torch.int64), pos=torch.tensor(points), num_nodes=len(points))


def together(*names: str, combine: str = "add", k: int = K, seed: int = 0, **options: object) -> CombinedEncodings:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_positional(names, DIM, k=k, n_frequencies=M, combine=combine, **options).eval()


def make(name: str, k: int = K, seed: int = 0, **options: object) -> PositionalEncoding:
    (encoding,) = together(name, k=k, seed=seed, **options)
    return encoding


def some_tokens(n: int) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(0))


def joined(module: CombinedEncodings, data: Data, tokens: Tensor | None = None) -> Tensor:
    """Tokens of one FOV with their encodings."""
    tokens = some_tokens(data.num_nodes) if tokens is None else tokens
    with torch.no_grad():
        return module(tokens, [Positions(module.features(data), data.edge_index, None)], data.edge_index)


def close(actual: object, expected: object, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


# --- the tables of the docs -------------------------------------------------------------------------------------------


def transformed(points: np.ndarray, change: str) -> np.ndarray:
    changes = {
        "translation": points + np.array([1e4, -3e3]),
        "rotation": rotated(points),
        "reflection": points * [-1, 1],
    }
    return changes[change]


def check_invariant(name: str, change: str) -> None:
    """The features, and what the encoding makes of them, stay the same."""
    points = scattered(150)
    close(shown(transformed(points, change), name), shown(points, name))
    module = together(name)
    close(joined(module, fov(transformed(points, change))), joined(module, fov(points)), 2e-4)


def check_variant(name: str, change: str) -> None:
    points, module = scattered(150), together(name)
    before, after = shown(points, name), shown(transformed(points, change), name)
    assert np.abs(after - before).max() > 0.1
    assert (joined(module, fov(transformed(points, change))) - joined(module, fov(points))).abs().max() > 0.01


def check_invariant_if_all_are(_: str, change: str) -> None:
    points = scattered(150)
    for names in ([*GRAPH, *CONDITIONAL], ["laplacian", "linear"]):
        module = together(*names, combine="concat")
        before, after = joined(module, fov(points)), joined(module, fov(transformed(points, change)))
        if "linear" in names and change != "translation":
            assert (after - before).abs().max() > 1e-3
        else:
            close(after, before, 1e-3)


def check_bins(name: str, _: str) -> None:
    module = make(name)
    encoded = module(module.features(at((-4, -4), (4, 4), (6, 4))))
    assert torch.equal(encoded[0], encoded[1])
    assert not torch.equal(encoded[1], encoded[2])
    every = torch.cartesian_prod(torch.arange(33), torch.arange(33))
    assert len(module({"patch": every}).unique(dim=0)) == 33 * 33


def check_distances_are_kept(name: str, _: str) -> None:
    points = scattered(80)
    unit = typical_distance(points, spatial_graph(points))
    values = shown(points, name)
    close(values, (points - points.mean(0)) / (30 * unit), 1e-6)
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    close(30 * unit * np.linalg.norm(values[:, None] - values, axis=2), distance, 1e-4)


def check_features_as(other: str) -> Callable[[str, str], None]:
    def check(name: str, _: str) -> None:
        points = scattered(150)
        assert np.array_equal(shown(points, name), shown(points, other))
        check_distance[other](name)

    check_distance = {"linear": lambda name: check_distances_are_kept(name, ""), "laplacian": lambda name: None}
    return check


def check_displacement(_: str, __: str) -> None:
    module = SinusoidalEncoding(DIM, k=K)
    rng = np.random.default_rng(0)
    start = torch.from_numpy(rng.uniform(-100, 100, (200, 2))).float()
    wavelengths = np.geomspace(4, 1000, K)
    for displacement in ([3.0, 0.0], [-1.0, 2.0], [40.0, 25.0]):
        products = (module.basis(start) * module.basis(start + torch.tensor(displacement))).sum(1)
        expected = sum(np.cos(2 * np.pi * np.array(displacement) / wavelength).sum() for wavelength in wavelengths)
        close(products, np.full(200, expected), 1e-3)

    def product(x: float, y: float) -> float:
        return float((module.basis(torch.tensor([[x, y]])) * module.basis(torch.zeros(1, 2))).sum())

    assert product(5, 3) == pytest.approx(product(-5, 3), abs=1e-4)  # footnote 2
    assert product(5, 3) == pytest.approx(product(3, 5), abs=1e-4)
    assert abs(product(5, 0) - product(5 / np.sqrt(2), 5 / np.sqrt(2))) > 0.1


def check_gaussian_of_distance(_: str, __: str) -> None:
    """Of the stated bandwidth, whatever the direction, with the stated standard error."""
    for m in (200, 20_000):
        module = FourierEncoding(DIM, n_frequencies=m)
        length = np.tile(np.arange(0, 40, 2.0), 24)
        angle = np.repeat(np.linspace(0, 2 * np.pi, 24, endpoint=False), 20)
        displacement = np.stack([length * np.cos(angle), length * np.sin(angle)], 1)
        origin = torch.tensor([[7.0, -20.0]])
        products = (module.basis(origin + torch.from_numpy(displacement).float()) * module.basis(origin)).sum(1) / m
        error = products.numpy() - np.exp(-(length**2) / (2 * 10**2))
        assert np.sqrt(np.mean(error**2)) < 1.5 / np.sqrt(2 * m)


def check_alike_nearby(name: str, _: str) -> None:
    points = scattered(400)
    vectors = shown(points, name)[:, :3]
    distance = np.linalg.norm(points[:, None] - points, axis=2).ravel()
    apart = np.linalg.norm(vectors[:, None] - vectors, axis=2).ravel()
    assert np.corrcoef(distance, apart)[0, 1] > 0.6


def check_no_distance_of_surroundings(_: str, __: str) -> None:
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


def check_like_surroundings(name: str, _: str) -> None:
    """On a long path with tokens of period 10, the middle of every period looks alike; other cells do not."""
    n = 80
    path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    data = Data(edge_index=torch.cat([path, path.flip(0)], 1), pos=torch.zeros(n, 2), num_nodes=n)
    tokens = some_tokens(10).repeat(8, 1)
    encoding = joined(together(name), data, tokens) - tokens
    inner = encoding[10:70].view(6, 10, DIM)
    close(inner, inner[:1].expand(6, -1, -1), 1e-5)
    assert torch.cdist(inner[0], inner[0]).fill_diagonal_(9).min() > 1e-3


def check_linear_map(_: str, __: str) -> None:
    module, data = together("linear", "conditional", "laplacian", combine="concat"), fov(scattered(40))
    tokens, blocks = some_tokens(40), module.mix.weight.split(DIM, dim=1)
    with torch.no_grad():
        parts = [encoding(encoding.features(data), data.edge_index, token_features=tokens) for encoding in module]
        expected = sum(part @ block.T for part, block in zip([tokens, *parts], blocks, strict=True)) + module.mix.bias
    close(joined(module, data), expected)


def check_graph_is_not_seen(name: str, _: str) -> None:
    module, data = make(name), fov(scattered(40))
    torn = Data(edge_index=data.edge_index[:, :10], pos=data.pos, num_nodes=40)
    expected, features = module.features(data), module.features(torn)
    assert all(torch.equal(features[key], expected[key]) for key in expected)
    assert torch.equal(module(expected, torn.edge_index), module(expected, data.edge_index))


def check_components(name: str, _: str) -> None:
    parts = [fov(scattered(40)), fov(scattered(25, 1)), at((0.0, 0.0)), fov(scattered(3, 2))]
    starts = np.cumsum([0, *(part.num_nodes for part in parts)])
    edges = torch.cat([part.edge_index + int(start) for part, start in zip(parts, starts)], 1)
    module, tokens = together(name), some_tokens(69)
    whole = joined(module, Data(edge_index=edges, num_nodes=int(starts[-1])), tokens)
    alone = [joined(module, part, tokens[start : start + part.num_nodes]) for part, start in zip(parts, starts)]
    close(whole, torch.cat(alone))


def check_isolated_is_zero(name: str, _: str) -> None:
    check_components(name, _)
    assert torch.equal(joined(together(name), at((3.0, 4.0))), some_tokens(1))


def far_out(name: str) -> tuple[PositionalEncoding, Tensor]:
    module = make(name)
    with torch.no_grad():
        encoded = module(module.features(at((2e4, -3e4), (4e4, -6e4))))
    assert torch.isfinite(encoded).all()
    return module, encoded


def check_outermost_bins(name: str, _: str) -> None:
    module, encoded = far_out(name)
    assert torch.equal(encoded[0], encoded[1])
    edge = module.features(at((164, 0), (166, 0), (900, 0), (154, 0)))["patch"][:, 1].tolist()
    assert edge == [32, 32, 32, 31]
    assert module.embedding.weight.std() < 0.03


def check_growth(name: str, _: str) -> None:
    _, encoded = far_out(name)
    assert encoded[1].norm() / encoded[0].norm() == pytest.approx(2, rel=0.01)


def check_bounded(name: str, _: str) -> None:
    module, _ = far_out(name)
    assert module.basis(at((2e4, -3e4), (4e4, -6e4), (0, 0)).pos).abs().max() <= 1


def check_mean_square(name: str, _: str) -> None:
    for n in (30, 300, 1200):
        close(np.square(shown(scattered(n), name)).mean(0), np.ones(K), 1e-4)


def check_shares(name: str, _: str) -> None:
    for n in (30, 300, 1200):
        values = shown(scattered(n), name)
        assert values.min() >= 0
        assert values.max() <= 1


def check_wherever(name: str, _: str) -> None:
    """The middle of an FOV is encoded the same when much else lies around it, far away or attached beyond two steps."""
    path = torch.stack([torch.arange(29), torch.arange(1, 30)])
    tokens, module = some_tokens(30), together(name)
    long = Data(edge_index=torch.cat([path, path.flip(0)], 1), pos=1e5 * torch.ones(30, 2), num_nodes=30)
    kept = (long.edge_index < 9).all(0)
    short = Data(edge_index=long.edge_index[:, kept], pos=torch.zeros(9, 2), num_nodes=9)
    whole, part = joined(module, long, tokens), joined(module, short, tokens[:9])
    close(whole[:7], part[:7], 1e-5)
    assert (whole[7:9] - part[7:9]).abs().amax(1).min() > 1e-3


def check_width(width: int) -> Callable[[str, str], None]:
    def check(name: str, _: str) -> None:
        features = make(name).features(fov(scattered(50)))
        if width:
            assert shown(scattered(50), name).shape == (50, width)
        else:
            assert features == {}

    return check


def check_features_of_parts(_: str, __: str) -> None:
    module, data = together("laplacian", "patch", "conditional", combine="concat"), fov(scattered(50))
    expected = make("laplacian").features(data) | make("patch").features(data)
    features = module.features(data)
    assert features.keys() == expected.keys()
    assert all(torch.equal(features[key], expected[key]) for key in expected)


def check_none(_: str, __: str) -> None:
    chosen = resolve(
        preset="default", quality="default", positional=None, encoder="auto", decoder="auto", variational=False,
        masking="auto", n_latent=None, max_epochs=None,
    )  # fmt: skip
    assert chosen.positional == ()
    assert sf.SpaFormer(positional=None, progress=False)._positional() is None


CHECKS: dict[str, dict[str, Callable[[str, str], None]]] = {
    "translation": {"–": check_none, "yes": check_invariant, "if all parts do": check_invariant_if_all_are},
    "rotation": {
        "–": check_none, "yes": check_invariant, "no": check_variant, "if all parts do": check_invariant_if_all_are,
    },
    "reflection": {
        "–": check_none, "yes": check_invariant, "no": check_variant, "if all parts do": check_invariant_if_all_are,
    },
    "distance": {
        "–": check_none,
        "only whether two cells share a bin": check_bins,
        "the features keep distances exactly": check_distances_are_kept,
        "features as `linear`; what the perceptron keeps is learned": check_features_as("linear"),
        "inner products depend on the displacement alone, and on its direction too": check_displacement,
        "inner products, divided by *m*, approximate a Gaussian of the distance, standard deviation 10 typical "
        "distances": check_gaussian_of_distance,
        "along the tissue: nearby cells are alike in the first eigenvectors": check_alike_nearby,
        "no: it describes a cell's surroundings; cells in like surroundings are alike however far apart":
            check_no_distance_of_surroundings,
        "features as `laplacian`; what the network keeps is learned": check_features_as("laplacian"),
        "no: it describes expression around a cell; cells with like surroundings are alike however far apart":
            check_like_surroundings,
        "a linear map of token and parts": check_linear_map,
    },
    "graph that falls apart": {
        "–": check_none,
        "not affected": check_graph_is_not_seen,
        "each component is encoded as if it were alone": check_components,
        "each component is encoded as if it were alone; an isolated cell is 0": check_isolated_is_zero,
        "a linear map of token and parts": check_linear_map,
    },
    "unseen or larger slides": {
        "–": check_none,
        "beyond 16.5 bins from the centre all cells of a side share a bin; a bin without cells in training adds next "
        "to nothing": check_outermost_bins,
        "grows in proportion to the distance from the centre, without bound": check_growth,
        "far out, grows in proportion to the distance from the centre, without bound": check_growth,
        "features stay from −1 to 1": check_bounded,
        "features have mean square 1 whatever the size": check_mean_square,
        "features stay from 0 to 1": check_shares,
        "the same for the same tokens within two steps, wherever they lie": check_wherever,
        "a linear map of token and parts": check_linear_map,
    },
    "features per cell": {
        "–": check_none,
        "0": check_width(0),
        "2": check_width(2),
        "`k`": check_width(K),
        "4 `k`": check_width(4 * K),
        "2 *m*": check_width(2 * M),
        "those of its parts": check_features_of_parts,
    },
}  # fmt: skip
"""What is checked for the content of a cell in a table of the docs, by column."""


def tables() -> list[list[dict[str, str]]]:
    """Tables of properties in the docs, as rows of cells by column; footnote marks left out."""
    section = DOCS.read_text(encoding="utf-8").split("## What they do and do not see")[1].split("\n## ")[0]
    found: list[list[dict[str, str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
        rows = [[re.sub(" [¹²³⁴]$", "", cell.strip()) for cell in line[1:-1].split("|")] for line in block.splitlines()]
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


CLAIMS = [
    (row["name"].strip("`"), column, claim)
    for table in tables()
    for row in table
    for column, claim in row.items()
    if column != "name"
]


@pytest.mark.parametrize(("name", "column", "claim"), CLAIMS, ids=[f"{name}-{column}" for name, column, _ in CLAIMS])
def test_claims_of_the_docs(name: str, column: str, claim: str) -> None:
    CHECKS[column][claim](name, column)


def test_tables_are_complete_and_every_check_is_used() -> None:
    for table in tables():
        names = [row["name"].strip("`") for row in table]
        assert sorted(names) == sorted(["None", *POSITIONAL, "concatenated"])
    assert len(tables()) == 2
    used = {(column, claim) for _, column, claim in CLAIMS}
    assert used == {(column, claim) for column, checks in CHECKS.items() for claim in checks}


def test_every_encoding_is_of_one_kind() -> None:
    assert {*FIXED, *CONDITIONAL} == set(POSITIONAL)
    assert [name for name in POSITIONAL if POSITIONAL[name].needs_graph] == ["signnet"]
    assert [name for name in POSITIONAL if POSITIONAL[name].needs_tokens] == list(CONDITIONAL)
    assert {name for name in POSITIONAL if POSITIONAL[name].reads_components} == set(GRAPH)


# --- further properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POSITIONAL)
def test_origin_and_unit_of_coordinates_do_not_matter(name: str) -> None:
    points = scattered(150)
    expected = shown(points, name)
    assert np.ptp(expected, axis=0).max() > 0.05
    close(shown(points + np.array([1e4, -3e3]), name), expected)
    close(shown(points * 0.12, name), expected)
    close(shown(points * 1e5, name), expected)


def test_patch_size_is_in_the_unit_of_the_coordinates() -> None:
    """Bins of 3 µm, whatever the typical distance of the FOV; the same bins in another unit."""
    points = scattered(150)
    from_centre = points - points.mean(0)
    bins = np.floor(from_centre / 3 + 16.5)[:, ::-1]
    assert len(np.unique(bins, axis=0)) > 10
    assert np.array_equal(shown(points, "patch", patch_size=3), bins)
    assert np.array_equal(shown(1000 * points, "patch", patch_size=3000), bins)
    assert np.array_equal(shown(points[::3], "patch", patch_size=3), np.floor(
        (points[::3] - points[::3].mean(0)) / 3 + 16.5)[:, ::-1])  # fmt: skip
    unit = typical_distance(points, spatial_graph(points))
    close(shown(points, "patch", patch_size=10 * unit), shown(points, "patch"))


def test_random_walk_starts_as_large_as_other_encodings() -> None:
    data = fov(scattered(400))
    size = {}
    for name in ("random_walk", "laplacian"):
        module = build_positional(name, 64, k=10)
        size[name] = joined_alone(module, data)
    assert 0.7 < size["random_walk"] / size["laplacian"] < 1.4


def joined_alone(module: CombinedEncodings, data: Data) -> float:
    return float(joined(module, data, torch.zeros(data.num_nodes, 64)).square().mean().sqrt())


@pytest.mark.parametrize("name", FIXED)
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
        assert all(torch.equal(a, b) for a, b in zip(*(make(name).features(fov(points)).values() for _ in range(2))))


@pytest.mark.parametrize("k", [1, 2, 10])
def test_wavelengths_are_geometric(k: int) -> None:
    wavelengths = 2 * np.pi / SinusoidalEncoding(DIM, k=k).frequencies.numpy()
    assert wavelengths[0] == pytest.approx(4)
    if k > 1:
        assert wavelengths[-1] == pytest.approx(1000)
        close(wavelengths[1:] / wavelengths[:-1], np.full(k - 1, 250 ** (1 / (k - 1))), 1e-3)


def test_fourier_kernel_of_a_tissue_hardly_depends_on_rotation_and_reflection() -> None:
    points, module = scattered(60), FourierEncoding(DIM, n_frequencies=20_000)

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


@pytest.mark.parametrize("name", POSITIONAL)
@pytest.mark.parametrize(
    "points", [scattered(1), np.zeros((1, 2)), scattered(2), np.ones((9, 2)), scattered(3)[[0, 0, 1, 2]]]
)
def test_smallest_fields(name: str, points: np.ndarray) -> None:
    values = shown(points, name)
    assert values.shape == (len(points), WIDTH.get(name, K))
    assert np.isfinite(values).all()
    if len(points) == 1 and name in FIXED:
        centre = {"patch": [16, 16], "sinusoidal": [0] * 2 * K + [1] * 2 * K, "fourier": [1] * M + [0] * M}
        assert values[0].tolist() == centre.get(name, [0] * values.shape[1])
    assert torch.isfinite(joined(together(name), fov(points))).all()


@pytest.mark.parametrize("name", FIXED)
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
    sf.pp.positional_encoding(adata, name, library_key=["slide", "fov"], k=K, n_frequencies=M)
    values = np.empty_like(adata.obsm[f"X_pe_{name}"])
    values[order] = adata.obsm[f"X_pe_{name}"]
    for part, found in zip(parts, np.split(values, np.cumsum(sizes)[:-1])):
        close(found, shown(part, name))


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


@pytest.mark.parametrize("name", FIXED)
def test_gradients_reach_all_learned_parts(name: str) -> None:
    module, data = make(name).train(), fov(scattered(30))
    features = module.features(data)
    assert not any(feature.requires_grad for feature in features.values())
    module(features, data.edge_index).square().sum().backward()
    assert list(module.parameters())
    for parameter in module.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FIXED)
def test_features_have_their_names_and_the_encoding_its_shape(name: str) -> None:
    module, data = make(name), fov(scattered(30))
    features = module.features(data)
    assert tuple(features) == module.feature_names
    assert all(len(feature) == 30 for feature in features.values())
    assert module(features, data.edge_index).shape == (30, DIM)


def test_all_encodings_can_be_added() -> None:
    module, data = together(*POSITIONAL), fov(scattered(30))
    features, tokens = module.features(data), some_tokens(30)
    assert len(features) == 6  # three of the Laplacian's, probabilities, bins, and one of all coordinate encodings
    with torch.no_grad():
        parts = [encoding(encoding.features(data), data.edge_index, token_features=tokens) for encoding in module]
    torch.testing.assert_close(joined(module, data), tokens + torch.stack(parts).sum(0))
    assert not together(*(name for name in POSITIONAL if name != "signnet")).needs_graph


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
    assert sf.pp.positional_encoding(tissue, name, library_key="fov", k=K, n_frequencies=M) is None
    key = f"X_pe_{name}"
    values = tissue.obsm[key]
    assert type(values) is np.ndarray
    assert (values.dtype, values.shape) == (np.float32, (tissue.n_obs, WIDTH.get(name, K)))
    module = make(name)
    for field in tissue.obs["fov"].unique() if name in FIXED else ():
        here = np.flatnonzero(tissue.obs["fov"] == field)
        first = module.features(fov(tissue.obsm["spatial"][here]))[module.feature_names[0]]
        close(values[here], module.basis(first) if hasattr(module, "basis") else first)
    assert tissue.uns[key]["params"] == {
        "encoding": name, "library_key": ["fov"], "spatial_key": "spatial", "connectivity_key": None,
        "layer": None, "n_neighbors": 6, "k": K, "n_frequencies": M, "patch_size": None,
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
        ({"n_frequencies": 0}, ValueError, "`n_frequencies=0` must be at least 1"),
        ({"patch_size": -3}, ValueError, "`patch_size=-3.*` must be"),
        ({"patch_size": "wide"}, TypeError, "`patch_size='wide'` must be"),
        ({"name": "conditional", "layer": "raw"}, KeyError, "`layer='raw'` is not in `adata.layers`"),
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
