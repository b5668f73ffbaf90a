"""Conditional encodings: written out by hand, how far they see, masks, torn graphs, batch mates; in a model."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

import spaformer_sc as sf
from spaformer_sc._geometric import Data
from spaformer_sc.data._fields import GraphConfig, Layout, fields_of_view
from spaformer_sc.nn.masking import CORRUPTIONS, MaskingRates, MaskingSchedule, SparseCounts
from spaformer_sc.nn.network import Network, NetworkConfig, Tokens
from spaformer_sc.positional import POSITIONAL, PositionalEncoding, build_positional
from spaformer_sc.training.sequences import FieldCounts, Sampler, View, collate, sequences
from tests.conftest import contents

NAMES = ["conditional", "conditional_gat"]
DIM, G = 12, 15
SHARE = torch.full((G,), 1 / G)


def make(name: str, seed: int = 0) -> PositionalEncoding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (encoding,) = build_positional(name, DIM)
        for parameter in encoding.parameters():  # biases that start at 0 shall count too
            torch.nn.init.normal_(parameter, std=0.4)
        return encoding.eval()


def graph(n: int = 60, seed: int = 0) -> Tensor:
    """Symmetric random graph of about 4 neighbours; its last two cells have none."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, n - 2, (2 * n, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    edges = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    return torch.from_numpy(edges.T.copy())


def some_tokens(n: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def adjacency(edges: Tensor, n: int) -> Tensor:
    dense = torch.zeros(n, n)
    dense[edges[0], edges[1]] = 1
    return dense


@pytest.mark.parametrize("name", NAMES)
def test_what_an_encoding_is(name: str) -> None:
    module = make(name)
    assert (module.name, module.needs_tokens, module.needs_graph, module.options) == (name, True, False, ())
    assert module.features(Data(num_nodes=3)) == {}
    assert module.feature_names == ()
    assert module({}, graph(), token_features=some_tokens()).shape == (60, DIM)
    assert [key for key in POSITIONAL if POSITIONAL[key].needs_tokens] == NAMES


@torch.no_grad()
def test_gin_written_out() -> None:
    module, edges, h = make("conditional"), graph(), some_tokens()
    a = adjacency(edges, 60)
    expected = module.norm(h)
    for layer, norm in zip(module.layers, module.norms):
        expected = norm(layer.nn((1 + layer.eps) * expected + a @ expected)).relu()
    torch.testing.assert_close(module({}, edges, token_features=h), module.linear(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gat_written_out() -> None:
    """Head by head with dense attention over a cell and its neighbours."""
    module, edges, h = make("conditional_gat"), graph(), some_tokens()
    near = (adjacency(edges, 60) + torch.eye(60)) > 0
    expected = module.norm(h)
    for layer, norm in zip(module.layers, module.norms):
        attention = layer.attention
        source = attention.lin_l(expected).view(60, 4, 3)
        target = attention.lin_r(expected).view(60, 4, 3)
        heads = []
        for head in range(4):
            joint = torch.nn.functional.leaky_relu(target[:, None, head] + source[None, :, head], 0.2)
            score = (joint @ attention.att[0, head]).masked_fill(~near, -torch.inf)
            heads.append(score.softmax(1) @ source[:, head])
        expected = norm(layer.linear(torch.cat(heads, 1) + attention.bias)).relu()
    torch.testing.assert_close(module({}, edges, token_features=h), module.linear(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_reach_is_two_steps(name: str) -> None:
    """A change of one token reaches the cells within two steps, all of them, and no others."""
    module, edges, tokens = make(name), graph(), some_tokens()
    steps = shortest_path(sp.csr_array(adjacency(edges, 60).numpy()), unweighted=True)
    expected = module({}, edges, token_features=tokens)
    reached = 0
    for cell in (0, 17, 59):
        changed = tokens.clone()
        changed[cell] += torch.linspace(-2, 2, DIM)
        moved = (module({}, edges, token_features=changed) - expected).abs().amax(1) > 1e-6
        assert moved.numpy().tolist() == (steps[cell] <= 2).tolist()
        reached += int(moved.sum())
    assert reached > 20


@pytest.mark.parametrize("name", NAMES)
def test_cells_without_neighbours_are_encoded_from_their_own_token(name: str) -> None:
    module, tokens = make(name), some_tokens()
    none = torch.empty(2, 0, dtype=torch.int64)
    alone = module({}, none, token_features=tokens[-1:])
    assert torch.isfinite(alone).all()
    torch.testing.assert_close(module({}, graph(), token_features=tokens)[-1:], alone)
    torch.testing.assert_close(module({}, none, token_features=tokens)[-1:], alone)
    assert not torch.allclose(alone, module({}, none, token_features=tokens[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_batch_mates_and_order_do_not_matter(name: str) -> None:
    module = make(name)
    parts = [(graph(), some_tokens()), (graph(30, 1), some_tokens(30, 1)), (graph(12, 2), some_tokens(12, 2))]
    alone = torch.cat([module({}, edges, token_features=tokens) for edges, tokens in parts])
    edges = torch.cat([part[0] + start for part, start in zip(parts, (0, 60, 90))], dim=1)
    tokens = torch.cat([part[1] for part in parts])
    torch.testing.assert_close(module({}, edges, token_features=tokens), alone, rtol=1e-5, atol=1e-5)
    order = torch.from_numpy(np.random.default_rng(0).permutation(102))
    place = torch.empty_like(order)
    place[order] = torch.arange(102)
    permuted = module({}, place[edges], token_features=tokens[order])
    torch.testing.assert_close(permuted, alone[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scale_of_tokens_does_not_matter_and_training_is_as_evaluation(name: str) -> None:
    module, edges, tokens = make(name), graph(), some_tokens()
    expected = module({}, edges, token_features=tokens)
    torch.testing.assert_close(module({}, edges, token_features=50 * tokens), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(module.train()({}, edges, torch.Generator(), token_features=tokens), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_all_learned_parts(name: str) -> None:
    module, tokens = make(name).train(), some_tokens().requires_grad_()
    module({}, graph(), token_features=tokens).square().sum().backward()
    for parameter in (*module.parameters(), tokens):
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_missing_input_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="`edge_index` is None, but a conditional encoding needs tokens"):
        make(name)({}, None, token_features=some_tokens())
    with pytest.raises(ValueError, match="`token_features` is None"):
        make(name)({}, graph())


# --- in the network ---------------------------------------------------------------------------------------------------


def network(names: list[str], combine: str = "add") -> Network:
    config = NetworkConfig(
        n_genes=G, dim=16, n_layers=1, n_heads=4, feedforward=2, n_latent=6, encoder="mlp", decoder="poisson",
        variational=False, hops=1, posterior=False, dropout=0.0, target_sum=30.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        positional = build_positional(names, 16, combine=combine)
    parts = ("embedding", "neighbours", "encoder", "decoder", "variational")
    seeds = {part: i for i, part in enumerate(parts)}
    return Network(config, gene_share=SHARE, positional=positional, seeds=seeds).eval()


def slide(names: list[str]) -> list[FieldCounts]:
    """Three FOVs; one of a single cell."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(1.5, (80, G)).astype(np.float32))
    codes = np.array([0] * 50 + [1] * 29 + [2])
    fields, _ = fields_of_view(Layout(
        rng.uniform(0, 50, (80, 2)), codes, ["a", "b", "c"], graph=GraphConfig(), given=None, n_rings=1,
        tile_size=4000, encode=build_positional(names, 16).features,
    ))  # fmt: skip
    return sequences(fields, counts, None)


def sampler(names: list[str]) -> Sampler:
    needs = "graph" if build_positional(names, 16).needs_graph else "rows"
    return Sampler(
        tokens_per_step=30, corruptions=("bilevel",), rates=MaskingSchedule(), gene_share=SHARE, target_sum=30.0,
        positional=needs, graph=True, windows=True, device=torch.device("cpu"),
    )  # fmt: skip


def view(sequence: FieldCounts, masking: str) -> View:
    generator = torch.Generator().manual_seed(7)
    counts = SparseCounts.of(sequence.counts)
    return View.of(sequence.fov, CORRUPTIONS[masking](counts, None, SHARE, MaskingRates(), generator), SHARE, 30.0)


MIXES = [["conditional"], ["conditional_gat"], ["conditional", "signnet"], ["linear", "conditional_gat", "laplacian"]]


@pytest.mark.parametrize("combine", ["add", "concat"])
@pytest.mark.parametrize("names", MIXES)
def test_network_does_not_depend_on_batch_mates(names: list[str], combine: str) -> None:
    data, net, take = slide(names), network(names, combine), sampler(names)
    alone = [take.whole(s) for s in data]
    views = [(view(s, "none"), torch.arange(s.fov.n_cells)) for s in data]
    together = collate(views, positional=take.positional, graph=True, device=torch.device("cpu")).tokens
    latents = torch.cat([net(tokens).latent for tokens in alone])
    assert torch.isfinite(latents).all()
    torch.testing.assert_close(net(together).latent, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", MIXES)
def test_network_trains_on_windows(names: list[str]) -> None:
    data, net, take = slide(names), network(names), sampler(names)
    seen = 0
    for batch in take.epoch(data, torch.Generator().manual_seed(0)):
        output = net(batch.tokens, torch.Generator())
        assert torch.isfinite(output.latent).all()
        seen += len(output.latent)
    assert seen == 80


@pytest.mark.parametrize("masking", ["bilevel", "tokens", "features"])
@pytest.mark.parametrize("name", NAMES)
def test_no_hidden_count_reaches_the_output(name: str, masking: str) -> None:
    sequence, net = slide([name])[0], network([name])
    torch.nn.init.normal_(net.hidden_token, generator=torch.Generator().manual_seed(3))

    def tokens(counts: sp.csr_matrix) -> Tokens:
        changed = replace(sequence, matrix=counts, rows=None)
        pieces = [(view(changed, masking), torch.arange(sequence.fov.n_cells))]
        return collate(pieces, positional="rows", graph=True, device=torch.device("cpu")).tokens

    before = tokens(sequence.counts)
    hidden = ~before.visible.numpy()
    assert 0.1 < hidden.mean() < 0.9
    expected = net(before).latent
    torch.testing.assert_close(net(tokens(sequence.counts + sp.csr_matrix(9.0 * hidden))).latent, expected)
    shown = net(tokens(sequence.counts + sp.csr_matrix(9.0 * ~hidden * (np.arange(G) < 3)))).latent
    assert (shown - expected).abs().max() > 1e-3


@pytest.mark.parametrize("combine", ["add", "concat"])
def test_weights_of_the_network_do_not_depend_on_its_encodings(combine: str) -> None:
    plain = dict(network(["linear"]).named_parameters())
    changed = dict(network(["linear", "conditional"], combine).named_parameters())
    assert plain.keys() < changed.keys()
    assert all(torch.equal(changed[key], plain[key]) for key in plain)


# --- in a model and alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positional", "settings"),
    [
        ("conditional", {}),
        (["conditional_gat", "patch"], {"positional_combine": "concat", "patch_size": 20.0}),
        ("fourier", {"n_frequencies": 9}),
    ],
)
def test_a_model_is_fitted_and_saved(
    positional: object, settings: dict[str, object], tissue: ad.AnnData, tmp_path: object
) -> None:
    model = sf.SpaFormer(
        library_key="fov",
        quality="fast",
        positional=positional,
        settings={"dim": 16, **settings},
        max_epochs=1,
        progress=False,
    ).fit(tissue)
    (network,) = model._networks
    assert list(network.positional.encodings) == ([positional] if isinstance(positional, str) else positional)
    assert (network.positional.mix is not None) == ("positional_combine" in settings)
    for encoding in network.positional:
        for name, option in (("patch", "patch_size"), ("fourier", "n_frequencies")):
            if encoding.name == name:
                found = encoding.patch_size if name == "patch" else len(encoding.frequencies)
                assert found == settings[option]
    expected = model.embed(tissue)
    assert np.isfinite(expected).all()
    model.save(tmp_path / "model")
    assert np.array_equal(sf.SpaFormer.load(tmp_path / "model").embed(tissue), expected)


def encoded(adata: ad.AnnData, name: str, **arguments: object) -> np.ndarray:
    return sf.pp.positional_encoding(adata, name, copy=True, **arguments).obsm[f"X_pe_{name}"]


@pytest.mark.parametrize("name", NAMES)
def test_untrained_encoding_of_counts(name: str, tissue: ad.AnnData) -> None:
    before = contents(tissue)
    state = torch.random.get_rng_state()
    values = encoded(tissue, name, library_key="fov", k=4)
    assert (values.shape, values.dtype) == ((tissue.n_obs, 4), np.float32)
    assert values.std(0).min() > 0.05
    assert np.array_equal(values, encoded(tissue, name, library_key="fov", k=4))
    np.testing.assert_allclose(values, encoded(tissue, name, library_key="fov", k=5)[:, :4], atol=1e-5)
    assert encoded(tissue, name, library_key="fov", k=70).shape == (tissue.n_obs, 70)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert contents(tissue) == before


@pytest.mark.parametrize("name", NAMES)
def test_untrained_encoding_sees_expression_of_neighbours_and_of_its_field_alone(name: str, tissue: ad.AnnData) -> None:
    values = encoded(tissue, name, library_key="fov")
    order = np.random.default_rng(0).permutation(tissue.n_obs)
    np.testing.assert_allclose(encoded(tissue[order].copy(), name, library_key="fov"), values[order], atol=1e-4)
    first = (tissue.obs["fov"] == tissue.obs["fov"].iloc[0]).to_numpy()
    np.testing.assert_allclose(encoded(tissue[first].copy(), name, library_key="fov"), values[first], atol=1e-4)
    counts = tissue.X.toarray() if sp.issparse(tissue.X) else np.array(tissue.X)
    tissue.layers["deeper"] = 3 * counts
    np.testing.assert_allclose(encoded(tissue, name, library_key="fov", layer="deeper"), values, atol=1e-4)
    counts[0] = counts[0, ::-1]
    tissue.layers["other"] = counts
    moved = np.abs(encoded(tissue, name, library_key="fov", layer="other") - values).max(1) > 1e-3
    assert moved[0]
    assert 5 < moved.sum() < first.sum()
    assert not moved[~first].any()


def test_untrained_encoding_of_cells_without_counts(tissue: ad.AnnData) -> None:
    counts = tissue.X.toarray() if sp.issparse(tissue.X) else np.array(tissue.X)
    counts[[0, 5]] = 0
    tissue.X = sp.csr_matrix(counts)
    for name in NAMES:
        assert np.isfinite(encoded(tissue, name, library_key="fov")).all()


def test_untrained_encoding_needs_counts_and_the_others_do_not(tissue: ad.AnnData) -> None:
    tissue.layers["log"] = np.log1p(tissue.X.toarray() if sp.issparse(tissue.X) else tissue.X)
    with pytest.raises(ValueError, match="log"):
        encoded(tissue, "conditional", library_key="fov", layer="log")
    with pytest.raises(KeyError, match=r"`layer='nowhere'` is not in"):
        encoded(tissue, "conditional_gat", library_key="fov", layer="nowhere")
    assert encoded(tissue, "linear", library_key="fov", layer="log").shape == (tissue.n_obs, 2)
