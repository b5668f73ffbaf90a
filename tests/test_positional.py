"""Positional encodings: eigenvectors against numpy, symmetries of the encodings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from spaformer_sc._geometric import Data
from spaformer_sc.nn.network import Positions
from spaformer_sc.positional import (
    POSITIONAL,
    LaplacianEncoding,
    PositionalEncoding,
    SignNetEncoding,
    build_positional,
    laplacian_eigenvectors,
)

DIM, K = 12, 6
FIXED = [name for name, encoding in POSITIONAL.items() if not encoding.needs_tokens]
"""Encodings of places alone; those that depend on tokens are in `test_conditional.py`."""


def symmetric(pairs: object) -> Tensor:
    edges = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return torch.from_numpy(np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0).T.copy())


def tissue(n: int, seed: int = 0) -> Tensor:
    """Symmetrised 6-nearest-neighbour graph of random points."""
    points = np.random.default_rng(seed).random((n, 2))
    _, neighbours = cKDTree(points).query(points, 7)
    return symmetric(np.stack([np.repeat(np.arange(n), 6), neighbours[:, 1:].ravel()], 1))


def path(n: int) -> Tensor:
    return symmetric([(i, i + 1) for i in range(n - 1)])


def ring(n: int) -> Tensor:
    return symmetric([(i, (i + 1) % n) for i in range(n)])


def joined(*graphs: tuple[Tensor, int]) -> tuple[Tensor, int]:
    edges, start = [], 0
    for edge_index, n in graphs:
        edges.append(edge_index + start)
        start += n
    return torch.cat(edges, 1), start


def dense_laplacian(edge_index: Tensor, n: int, weight: Tensor | None = None) -> np.ndarray:
    a = np.zeros((n, n))
    a[edge_index[0], edge_index[1]] = 1 if weight is None else weight
    degree = a.sum(1)
    return np.eye(n) - a / np.sqrt(np.outer(degree, degree))


def check_against_dense(edge_index: Tensor, n: int, k: int, weight: Tensor | None = None) -> None:
    """Eigenvalues equal numpy's, and every eigenspace that is whole among the first k is spanned by the vectors."""
    laplacian = dense_laplacian(edge_index, n, weight)
    expected, basis = np.linalg.eigh(laplacian)
    vectors, values, mask = laplacian_eigenvectors(edge_index, n, k, weight)
    assert mask.all()
    np.testing.assert_allclose(values.numpy(), np.tile(expected[1 : k + 1], (n, 1)), atol=1e-6)
    v = vectors.double().numpy() / np.sqrt(n)
    np.testing.assert_allclose(v.T @ v, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(laplacian @ v, v * expected[1 : k + 1], atol=1e-5)
    whole = k if expected[k + 1] - expected[k] > 1e-6 else np.searchsorted(expected, expected[k] - 1e-6) - 1
    b = basis[:, 1 : whole + 1]
    np.testing.assert_allclose(b @ (b.T @ v[:, :whole]), v[:, :whole], atol=1e-4)


@pytest.mark.parametrize("n", [12, 60, 256, 257, 400])
def test_eigenvectors_against_numpy(n: int) -> None:
    check_against_dense(tissue(n), n, K)


def test_eigenvectors_of_a_weighted_graph() -> None:
    edge_index = tissue(300)
    low, high = edge_index.min(0).values, edge_index.max(0).values
    weight = 0.2 + ((low * 7 + high * 13) % 10).float()  # symmetric
    check_against_dense(edge_index, 300, K, weight)


@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("k", [4, 5])
def test_degenerate_eigenvalues(n: int, k: int) -> None:
    """A ring has eigenvalues 1 − cos(2πj/n), each twice; k = 5 cuts through a pair."""
    check_against_dense(ring(n), n, k)


def test_path_has_known_eigenvalues() -> None:
    n = 30
    _, values, _ = laplacian_eigenvectors(path(n), n, 3)
    expected = 1 - np.cos(np.pi * np.arange(1, 4) / (n - 1))
    np.testing.assert_allclose(values[0].numpy(), expected, atol=1e-6)


def test_components_have_their_own_eigenvectors() -> None:
    """Each as if it were alone, none an indicator of a component, however cells are ordered."""
    parts = [(tissue(300), 300), (path(2), 2), (tissue(40, 1), 40), (path(4), 4)]
    edge_index, n = joined(*parts)
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    vectors, values, mask = laplacian_eigenvectors(order[edge_index], n, K)
    vectors, values, mask = vectors[order], values[order], mask[order]
    start = 0
    for part_edges, size in parts:
        rows = slice(start, start + size)
        alone, alone_values, alone_mask = laplacian_eigenvectors(part_edges, size, K)
        count = min(K, size - 1)
        assert mask[rows, :count].all()
        assert not mask[rows, count:].any()
        assert torch.equal(mask[rows], alone_mask)
        torch.testing.assert_close(values[rows], alone_values, rtol=1e-5, atol=1e-6)
        overlap = (vectors[rows, :count] * alone[:, :count]).mean(0).abs()
        torch.testing.assert_close(overlap, torch.ones(count), rtol=0, atol=1e-4)
        assert (vectors[rows, count:] == 0).all()
        assert (values[rows, count:] == 0).all()
        assert (vectors[rows, :count].std(0, correction=0) > 0.1).all()
        start += size


def test_percolating_graph_has_no_indicator_among_its_eigenvectors() -> None:
    points = np.random.default_rng(0).random((400, 2)) * 20
    edge_index = symmetric(cKDTree(points).query_pairs(1.0, output_type="ndarray"))
    adjacency = sparse.coo_array((np.ones(edge_index.shape[1]), edge_index.numpy()), shape=(400, 400))
    n_components, labels = connected_components(adjacency)
    assert n_components > 10
    vectors, values, mask = laplacian_eigenvectors(edge_index, 400, K)
    assert (values[mask] > 1e-6).all()
    constant = torch.bincount(edge_index[0], minlength=400).sqrt()[:, None]  # the trivial eigenvector of each component
    for label in range(n_components):
        rows = torch.from_numpy(labels == label)
        assert mask[rows].sum(1).unique().tolist() == [min(K, int(rows.sum()) - 1)]
        assert (vectors[rows] * constant[rows]).mean(0).abs().max() < 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, K, K + 1, K + 2])
def test_fewer_cells_than_eigenvectors(n: int) -> None:
    vectors, values, mask = laplacian_eigenvectors(path(n), n, K)
    assert vectors.shape == values.shape == mask.shape == (n, K)
    count = min(K, n - 1)
    assert mask.sum(1).tolist() == [count] * n
    if count:
        expected = np.linalg.eigvalsh(dense_laplacian(path(n), n))[1 : count + 1]
        np.testing.assert_allclose(values[0, :count].numpy(), expected, atol=1e-6)
    assert torch.isfinite(vectors).all()


def test_isolated_cells_have_none() -> None:
    edge_index, n = joined((path(5), 5), (path(1), 1), (path(1), 1))
    vectors, values, mask = laplacian_eigenvectors(edge_index, n, 3)
    assert not mask[5:].any()
    assert (vectors[5:] == 0).all()
    assert (values[5:] == 0).all()
    assert mask[:5].all()


def test_self_loops_and_missing_directions_do_not_matter() -> None:
    edge_index = tissue(50)
    once = edge_index[:, edge_index[0] < edge_index[1]]
    loops = torch.arange(50).expand(2, -1)
    for variant in (once, torch.cat([edge_index, loops], 1)):
        for a, b in zip(laplacian_eigenvectors(variant, 50, K), laplacian_eigenvectors(edge_index, 50, K)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [50, 300, 1200])
def test_entries_are_of_order_one_whatever_the_size(n: int) -> None:
    vectors, _, _ = laplacian_eigenvectors(tissue(n), n, K)
    torch.testing.assert_close(vectors.square().mean(0), torch.ones(K), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [41, 301])
def test_signs_are_canonical_even_for_ties(n: int) -> None:
    """The odd eigenvectors of a path have two entries of the same largest magnitude; the first is positive."""
    vectors, _, _ = laplacian_eigenvectors(path(n), n, 5)
    largest = vectors.abs().amax(0)
    first = (vectors.abs() >= 0.9999 * largest).int().argmax(0)
    assert (vectors[first, torch.arange(5)] > 0).all()
    assert (vectors[:, 0] - vectors[:, 0].flip(0)).abs().max() > 1  # an odd one is among them


def test_eigenvectors_are_deterministic_and_leave_random_states_alone() -> None:
    edge_index = ring(400)
    np_state, torch_state = np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    first = laplacian_eigenvectors(edge_index, 400, K)
    second = laplacian_eigenvectors(edge_index, 400, K)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), np_state))  # noqa: NPY002


@pytest.mark.parametrize("n", [60, 400])
def test_permuting_cells_permutes_eigenvectors_up_to_sign(n: int) -> None:
    edge_index = tissue(n)
    order = torch.from_numpy(np.random.default_rng(1).permutation(n))
    vectors, values, _ = laplacian_eigenvectors(edge_index, n, K)
    moved, moved_values, _ = laplacian_eigenvectors(order[edge_index], n, K)
    torch.testing.assert_close(moved_values[order], values, rtol=1e-5, atol=1e-6)
    signs = (moved[order] * vectors).mean(0).sign()
    torch.testing.assert_close(moved[order] * signs, vectors, rtol=0, atol=1e-4)


def test_wrong_arguments_of_eigenvectors_are_refused() -> None:
    with pytest.raises(ValueError, match="`k=0` must be at least 1"):
        laplacian_eigenvectors(path(3), 3, 0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`edge_weight` must be positive and finite"):
            laplacian_eigenvectors(path(3), 3, 2, torch.tensor([1.0, 1.0, 1.0, bad]))


# --- encodings --------------------------------------------------------------------------------------------------------


def fov(n: int, seed: int = 0) -> Data:
    pos = 10 * torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 2))).float()
    return Data(edge_index=tissue(n, seed), pos=pos, num_nodes=n)


def make(name: str, seed: int = 0) -> PositionalEncoding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (encoding,) = build_positional(name, DIM, k=K, n_frequencies=K)
        return encoding.eval()


def batch(module: torch.nn.Module, fovs: list[Data]) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    features = [module.features(data) for data in fovs]
    edge_index, _ = joined(*((data.edge_index, data.num_nodes) for data in fovs))
    return (
        {name: torch.cat([f[name] for f in features]) for name in features[0]},
        edge_index,
        [data.num_nodes for data in fovs],
    )


@pytest.mark.parametrize("name", FIXED)
def test_registry_names_features_and_shapes(name: str) -> None:
    module = make(name)
    assert type(module).name == name
    data = fov(30)
    features = module.features(data)
    assert tuple(features) == module.feature_names
    assert all(len(tensor) == 30 for tensor in features.values())
    assert module(features, data.edge_index).shape == (30, DIM)


@pytest.mark.parametrize("name", FIXED)
def test_encoding_does_not_depend_on_batch_mates(name: str) -> None:
    module = make(name)
    tiny = [Data(edge_index=path(n), pos=torch.ones(n, 2), num_nodes=n) for n in (1, 3)]
    fovs = [fov(40), tiny[0], fov(9, 1), fov(25, 2), tiny[1]]
    features, edge_index, lengths = batch(module, fovs)
    together = module(features, edge_index, lengths=lengths).split(lengths)
    for data, rows in zip(fovs, together):
        torch.testing.assert_close(rows, module(module.features(data), data.edge_index), rtol=1e-5, atol=1e-6)
        assert torch.isfinite(rows).all()


@pytest.mark.parametrize("name", FIXED)
def test_encoding_is_permutation_equivariant(name: str) -> None:
    module, data = make(name), fov(40)
    features = module.features(data)
    order = torch.from_numpy(np.random.default_rng(1).permutation(40))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(40))
    moved = module({key: value[back] for key, value in features.items()}, order[data.edge_index])
    torch.testing.assert_close(moved[order], module(features, data.edge_index), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FIXED)
def test_encoding_has_finite_gradients_for_all_its_weights(name: str) -> None:
    module = make(name).train()
    features, edge_index, lengths = batch(
        module, [fov(20), Data(edge_index=path(1), pos=torch.ones(1, 2), num_nodes=1)]
    )
    module(features, edge_index, lengths=lengths).square().sum().backward()
    for parameter in module.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FIXED)
def test_encoding_under_autocast(name: str) -> None:
    module, data = make(name), fov(30)
    features = module.features(data)
    expected = module(features, data.edge_index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(features, data.edge_index)
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)


def test_signnet_does_not_depend_on_signs() -> None:
    module, data = make("signnet"), fov(60)
    features = module.features(data)
    expected = module(features, data.edge_index)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        signs = 2.0 * torch.randint(2, (K,), generator=generator) - 1
        flipped = features | {"laplacian_vectors": features["laplacian_vectors"] * signs}
        torch.testing.assert_close(module(flipped, data.edge_index), expected, rtol=0, atol=1e-5)


def test_signnet_depends_on_each_eigenvector_and_eigenvalue() -> None:
    module, data = make("signnet"), fov(60)
    features = module.features(data)
    expected = module(features, data.edge_index)
    for name in ("laplacian_vectors", "laplacian_values"):
        for i in range(K):
            changed = features[name].clone()
            changed[:, i] *= 1.5
            assert (module(features | {name: changed}, data.edge_index) - expected).abs().max() > 1e-4


def test_signnet_is_rho_of_sums_of_phi() -> None:
    """Written out: one eigenvector and sign after the other, neighbours summed by a dense matrix."""
    module = make("signnet")
    edge_index, n = joined((tissue(20), 20), (path(3), 3))
    features = module.features(Data(edge_index=edge_index, num_nodes=n))
    adjacency = torch.zeros(n, n)
    adjacency[edge_index[0], edge_index[1]] = 1

    def phi(v: Tensor, value: Tensor) -> Tensor:
        h = torch.stack([v, value.sqrt()], 1)
        for i, conv in enumerate(module.phi):
            h = conv.nn(adjacency @ (h.relu() if i else h) + (h.relu() if i else h))
        return h

    vectors, values, mask = features.values()
    sums = [(phi(vectors[:, i], values[:, i]) + phi(-vectors[:, i], values[:, i])) * mask[:, i, None] for i in range(K)]
    torch.testing.assert_close(module(features, edge_index), module.rho(torch.cat(sums, 1)), rtol=1e-5, atol=1e-5)


def test_signnet_without_graph_is_refused() -> None:
    module = make("signnet")
    with pytest.raises(ValueError, match="`edge_index` is None, but SignNet needs the graph"):
        module(module.features(fov(10)))


def test_laplacian_flips_signs_per_fov_in_training_only() -> None:
    module = LaplacianEncoding(K, k=K)
    with torch.no_grad():
        module.linear.weight.copy_(torch.eye(K))
    features, edge_index, lengths = batch(module, [fov(20), fov(30, 1), fov(25, 2)])
    vectors = features["laplacian_vectors"]

    def encode(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return module(features, edge_index, generator, lengths=lengths)

    module.eval()
    assert torch.equal(encode(0), vectors)
    module.train()
    assert torch.equal(encode(None), vectors)
    assert torch.equal(encode(3), encode(3))
    seen = []
    for seed in range(20):
        for rows, original in zip(encode(seed).split(lengths), vectors.split(lengths)):
            signs = (rows * original).sum(0).sign()
            assert torch.equal(rows, original * signs)
            seen.append(signs)
    share = (torch.stack(seen) > 0).float().mean(0)
    assert ((share > 0.25) & (share < 0.75)).all()
    assert any(not torch.equal(a, b) for a, b in zip(seen[::3], seen[1::3]))  # FOVs of one batch


def test_isolated_cell_is_encoded_as_zero_by_laplacian() -> None:
    module = make("laplacian")
    assert (module(module.features(Data(edge_index=path(1), num_nodes=1))) == 0).all()


# --- several together -------------------------------------------------------------------------------------------------


def place(module: torch.nn.Module, data: Data) -> Positions:
    return Positions(module.features(data), data.edge_index, None)


def test_encodings_are_added_and_shared_features_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_positional(["laplacian", "signnet"], DIM, k=K).eval()
    assert module.needs_graph
    data = fov(30)
    tokens = torch.randn(30, DIM, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(SignNetEncoding, "features", lambda self, data: pytest.fail("computed twice"))
    features = module.features(data)
    expected = tokens + sum(encoding(features, data.edge_index) for encoding in module.encodings.values())
    torch.testing.assert_close(module(tokens, [Positions(features, data.edge_index, None)]), expected)


@pytest.mark.parametrize("combine", ["add", "concat"])
def test_fields_of_a_batch_and_rows_of_a_field(combine: str) -> None:
    """Each FOV is encoded whole by itself; where its graph is needed, rows pick its tokens."""
    module = build_positional(["signnet", "linear"], DIM, k=K, combine=combine).eval()
    fovs = [fov(20), fov(15, 1)]
    rows = [torch.tensor([4, 7, 11]), torch.tensor([0, 3])]
    tokens = torch.randn(35, DIM, generator=torch.Generator().manual_seed(0))
    whole = [module(part, [place(module, data)]) for part, data in zip(tokens.split([20, 15]), fovs)]
    torch.testing.assert_close(module(tokens, [place(module, data) for data in fovs]), torch.cat(whole))
    some = [Positions(module.features(data), data.edge_index, r) for data, r in zip(fovs, rows)]
    picked = torch.cat([part[r] for part, r in zip(tokens.split([20, 15]), rows)])
    expected = torch.cat([part[r] for part, r in zip(whole, rows)])
    torch.testing.assert_close(module(picked, some), expected)


def test_concatenation_is_a_linear_map_of_token_and_encodings() -> None:
    module = build_positional(["laplacian", "patch", "fourier"], DIM, k=K, combine="concat").eval()
    data, tokens = fov(30), torch.randn(30, DIM, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.mix.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(module.mix.bias, generator=torch.Generator().manual_seed(2))
    blocks = module.mix.weight.split(DIM, dim=1)
    parts = [tokens, *(encoding(encoding.features(data), data.edge_index) for encoding in module)]
    expected = sum(part @ block.T for part, block in zip(parts, blocks, strict=True)) + module.mix.bias
    torch.testing.assert_close(module(tokens, [place(module, data)]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [16, 128])
def test_concatenation_starts_as_the_token_with_little_beside_it(dim: int) -> None:
    names = ["laplacian", "sinusoidal"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_positional(names, dim, combine="concat").eval()
        torch.manual_seed(0)
        added = build_positional(names, dim).eval()
    data, tokens = fov(200), torch.randn(200, dim, generator=torch.Generator().manual_seed(0))
    shift = (module(tokens, [place(module, data)]) - tokens).std()
    full = (added(tokens, [place(added, data)]) - tokens).std()
    assert 0.05 < shift / full < 0.2
    blocks = module.mix.weight.split(dim, dim=1)
    assert torch.equal(blocks[0], torch.eye(dim))
    assert not torch.equal(blocks[1], blocks[2])
    assert (module.mix.bias == 0).all()


def test_weights_of_an_encoding_depend_on_no_other() -> None:
    states, after = [], []
    for names, combine in (
        ("signnet", "add"),
        (["laplacian", "signnet"], "add"),
        (["signnet", "conditional"], "add"),
        (["signnet", "laplacian"], "concat"),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            states.append(build_positional(names, DIM, k=K, combine=combine).encodings["signnet"].state_dict())
            after.append(torch.rand(3))
    assert all(torch.equal(state[key], states[0][key]) for state in states[1:] for key in state)
    assert all(torch.equal(numbers, after[0]) for numbers in after[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        other = build_positional("signnet", DIM, k=K).encodings["signnet"].state_dict()
    assert not torch.equal(other["rho.1.weight"], states[0]["rho.1.weight"])


def test_rows_only_encodings_need_no_graph() -> None:
    module = build_positional("laplacian", DIM, k=K)
    assert not module.needs_graph
    features = {name: tensor[::2] for name, tensor in module.features(fov(20)).items()}
    assert module(torch.zeros(10, DIM), [Positions(features, None, None)]).shape == (10, DIM)


def test_options_reach_the_encodings_they_are_for() -> None:
    widths = {
        name: [
            sum(p.numel() for p in build_positional(name, DIM, **{option: value}).parameters())
            for option in ("k", "n_frequencies")
            for value in (3, 5)
        ]
        for name in POSITIONAL
    }
    for name, (small_k, large_k, few, many) in widths.items():
        options = POSITIONAL[name].options
        assert (large_k > small_k) == ("k" in options), name
        assert (many > few) == ("n_frequencies" in options), name
    (patch,) = build_positional("patch", DIM, patch_size=7.5)
    assert patch.patch_size == 7.5
    assert [name for name in POSITIONAL if "patch_size" in POSITIONAL[name].options] == ["patch"]


@pytest.mark.parametrize("names", [[], "fourrier", ["laplacian", "nowhere"], ["laplacian", "laplacian"]])
def test_wrong_names_are_refused(names: object) -> None:
    with pytest.raises(ValueError, match="must be one or more distinct names out of: laplacian, signnet"):
        build_positional(names, DIM)
