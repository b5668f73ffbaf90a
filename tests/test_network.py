"""The network and its batches: permutation, batch mates, paired seeds, neighbours, variational latent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spaformer_sc.data._fields import GraphConfig, Layout, fields_of_view, neighbour_rings
from spaformer_sc.nn.masking import MaskingSchedule
from spaformer_sc.nn.network import Network, NetworkConfig, Tokens
from spaformer_sc.positional import build_positional
from spaformer_sc.training.sequences import Sampler, neighbour_values, sequences, token_graph, windows
from spaformer_sc.training.sparse import dense_product
from spaformer_sc.training.trainer import batch_loss

G = 20
CONFIG = NetworkConfig(
    n_genes=G, dim=16, n_layers=2, n_heads=4, feedforward=2, n_latent=6, encoder="performer", decoder="poisson",
    variational=False, hops=2, posterior=True, dropout=0.0, target_sum=30.0,
)  # fmt: skip
PARTS = ("embedding", "neighbours", "encoder", "decoder", "variational")
CPU = torch.device("cpu")


def network(**changes) -> Network:
    names = changes.pop("positional", None)
    share = torch.full((G,), 1 / G)
    seeds = {part: i for i, part in enumerate(PARTS)}
    positional = None if names is None else build_positional(names, 16, k=4)
    return Network(replace(CONFIG, **changes), gene_share=share, positional=positional, seeds=seeds).eval()


def awake(net: Network) -> Network:
    """Give attention, which starts at 0, some weight."""
    for layer in net.encoder.layers:
        if layer.attention is not None:
            torch.nn.init.normal_(layer.attention.out.weight, generator=torch.Generator().manual_seed(0))
    return net


def tissue(n: int = 90, n_fovs: int = 3, names: str | None = None):
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(1.5, (n, G)).astype(np.float32))
    coordinates = rng.uniform(0, 100, (n, 2))
    codes = np.sort(rng.integers(0, n_fovs, n))
    encode = None if names is None else build_positional(names, 16, k=4).features
    fields, _ = fields_of_view(Layout(
        coordinates, codes, [f"f{i}" for i in range(n_fovs)], graph=GraphConfig(), given=None, n_rings=2,
        tile_size=4000, encode=encode,
    ))  # fmt: skip
    return sequences(fields, counts, None)


def sampler(positional: str | None = None, **changes) -> Sampler:
    settings = dict(
        tokens_per_step=30, corruptions=("thinning",), rates=MaskingSchedule(), gene_share=torch.full((G,), 1 / G),
        target_sum=30.0, positional=positional, graph=False, windows=False, device=CPU,
    )  # fmt: skip
    return Sampler(**{**settings, **changes})


def join(batches: list[Tokens]) -> Tokens:
    return Tokens(
        values=tuple(torch.cat([b.values[i] for b in batches]) for i in range(3)),
        counts=torch.cat([b.counts for b in batches]),
        depth=torch.cat([b.depth for b in batches]),
        visible=None,
        lengths=[n for b in batches for n in b.lengths],
        positions=None if batches[0].positions is None else [p for b in batches for p in b.positions],
    )


@pytest.mark.parametrize("encoder", ["performer", "exact", "mlp"])
@pytest.mark.parametrize("names", [None, "laplacian", "signnet"])
def test_a_fov_does_not_depend_on_its_batch_mates(encoder: str, names: str | None) -> None:
    data = tissue(names=names)
    net = awake(network(encoder=encoder, positional=names))
    take = sampler(None if names is None else "graph" if names == "signnet" else "rows")
    alone = [take.whole(s) for s in data]
    together = net(join(alone))
    separate = [net(tokens) for tokens in alone]
    torch.testing.assert_close(together.latent, torch.cat([o.latent for o in separate]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        together.decoded.expression, torch.cat([o.decoded.expression for o in separate]), rtol=1e-5, atol=1e-7
    )


def test_cells_exchange_information_only_with_attention() -> None:
    tokens = sampler().whole(tissue()[0])
    changed = tuple(v.clone() for v in tokens.values)
    changed[0][0] += 1.0
    moved = replace(tokens, values=changed)
    for encoder, exchanges in (("performer", True), ("exact", True), ("mlp", False)):
        net = awake(network(encoder=encoder))
        difference = (net(moved).latent - net(tokens).latent).abs().amax(1)
        assert float(difference[0].detach()) > 1e-3
        assert bool((difference[1:] > 1e-7).any()) == exchanges


def test_permuting_the_cells_permutes_the_output() -> None:
    tokens = sampler().whole(tissue(n_fovs=1)[0])
    order = torch.randperm(len(tokens.depth), generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        tokens,
        values=tuple(v[order] for v in tokens.values),
        counts=tokens.counts[order],
        depth=tokens.depth[order],
    )
    net = awake(network())
    torch.testing.assert_close(net(shuffled).latent, net(tokens).latent[order], rtol=1e-5, atol=1e-5)


def test_switching_a_part_leaves_the_weights_of_the_others() -> None:
    plain = dict(network().named_parameters())
    for changes in (
        {"positional": "signnet"},
        {"hops": 0},
        {"encoder": "mlp"},
        {"variational": True},
        {"decoder": "nb"},
    ):
        for name, parameter in network(**changes).named_parameters():
            if name in plain:
                assert torch.equal(parameter, plain[name]), (changes, name)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    network(variational=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_hidden_token_is_told_apart_from_an_empty_cell() -> None:
    net = network()
    torch.nn.init.normal_(net.hidden_token, generator=torch.Generator().manual_seed(0))
    tokens = sampler().whole(tissue()[0])
    visible = torch.ones_like(tokens.counts, dtype=torch.bool)
    shown = net(replace(tokens, visible=visible)).latent
    torch.testing.assert_close(shown, net(tokens).latent)
    visible[3] = False
    hidden = net(replace(tokens, visible=visible)).latent
    assert not torch.allclose(hidden[3], shown[3])


def test_variational_latent_is_sampled_in_training_only() -> None:
    net = network(variational=True, posterior=False)
    tokens = sampler().whole(tissue()[0])
    first, second = net(tokens), net(tokens)
    assert torch.equal(first.decoded.expression, second.decoded.expression)
    net.train()
    a, b, c = (net(tokens, torch.Generator().manual_seed(s)).decoded.expression for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    mean, variance = first.latent, net.latent_log_variance(net.encoder(
        net.embedding(tokens.values[0]) + sum(e(v) for e, v in zip(net.neighbours, tokens.values[1:]))
        + net.depth(torch.log((tokens.depth + 1) / 31.0)[:, None]), tokens.lengths)).exp()  # fmt: skip
    posterior = torch.distributions.Normal(mean, variance.sqrt())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(first.divergence, divergence, rtol=1e-4, atol=1e-4)


def test_rings_average_over_one_and_over_exactly_two_steps() -> None:
    path = sp.diags([np.ones(5), np.ones(5)], [-1, 1]).tocsr().astype(np.float32)
    first, second = neighbour_rings(path, 2)
    np.testing.assert_allclose(first.toarray()[2], [0, 0.5, 0, 0.5, 0, 0])
    np.testing.assert_allclose(second.toarray()[2], [0.5, 0, 0, 0, 0.5, 0])
    np.testing.assert_allclose(second.toarray()[0], [0, 0, 1, 0, 0, 0])
    triangle = sp.csr_matrix(np.ones((3, 3), dtype=np.float32) - np.eye(3, dtype=np.float32))
    assert neighbour_rings(triangle, 2)[1].nnz == 0
    assert neighbour_rings(triangle, 0) == ()


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_the_dense_product_of_sparse_matrices(index) -> None:
    rng = np.random.default_rng(0)
    left, right = (sp.random(*shape, 0.3, "csr", np.float32, random_state=rng) for shape in ((9, 14), (14, 6)))
    for matrix in (left, right):
        matrix.indices, matrix.indptr = matrix.indices.astype(index), matrix.indptr.astype(index)
    found = dense_product(left, right)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (left @ right).toarray(), rtol=1e-6)
    assert not dense_product(left[:0], right).size
    assert not dense_product(sp.csr_matrix((3, 14), dtype=np.float32), right).any()
    with pytest.raises(ValueError, match="have no product"):
        dense_product(right, left)


def test_neighbour_means_leave_hidden_entries_out() -> None:
    (ring,) = neighbour_rings(sp.csr_matrix(np.ones((4, 4), dtype=np.float32) - np.eye(4, dtype=np.float32)), 1)
    values = torch.tensor([[1.0, 0.0], [2.0, 4.0], [3.0, 0.0], [0.0, 8.0]])
    visible = torch.tensor([[True, False], [True, True], [True, True], [False, True]])
    mean = neighbour_values(sp.csr_matrix((values * visible).numpy()), visible, ring)
    np.testing.assert_allclose(mean[0], [(2 + 3) / 2, (4 + 0 + 8) / 3], rtol=1e-6)
    np.testing.assert_allclose(mean[3], [(1 + 2 + 3) / 3, (4 + 0) / 2], rtol=1e-6)


def test_an_epoch_deals_every_cell_once_whatever_the_fovs() -> None:
    for n_fovs in (1, 3, 12):
        data = tissue(n=120, n_fovs=n_fovs)
        batches = list(sampler().epoch(data, torch.Generator().manual_seed(0)))
        assert sum(len(b.tokens.depth) for b in batches) == 120
        assert all(sum(b.tokens.lengths) == len(b.tokens.depth) for b in batches)
        assert 3 <= len(batches) <= 6
        total = sum(float((b.tokens.counts + b.target).sum()) for b in batches)
        assert total == sum(s.counts.sum() for s in data)


def test_a_small_buffer_changes_only_which_fovs_are_mixed() -> None:
    data = tissue(n=120, n_fovs=6)
    batches = list(sampler(buffer_bytes=1).epoch(data, torch.Generator().manual_seed(0)))
    assert sum(len(b.tokens.depth) for b in batches) == 120


def test_the_loss_of_a_masked_batch_counts_hidden_entries_only() -> None:
    net = network(posterior=False)
    (batch, *_) = sampler(corruptions=("features",)).epoch(tissue(), torch.Generator().manual_seed(0))
    loss = batch_loss(net, batch, 1.0, torch.Generator())
    decoded = net(batch.tokens).decoded
    likelihood = net.decoder.log_likelihood(decoded, batch.target, batch.target_depth)
    want = -likelihood[batch.asked].sum() / batch.target[batch.asked].sum()
    torch.testing.assert_close(loss, want)
    spoiled = replace(batch, target=torch.where(batch.asked, batch.target, batch.target + 5))
    torch.testing.assert_close(batch_loss(net, spoiled, 1.0, torch.Generator()), want)


def test_attention_starts_as_if_it_were_not_there() -> None:
    tokens = sampler().whole(tissue()[0])
    without = network(encoder="mlp")(tokens)
    for encoder in ("performer", "exact"):
        assert torch.equal(network(encoder=encoder)(tokens).latent, without.latent)


def test_at_the_start_tokens_tell_of_expression_and_not_of_depth() -> None:
    net = network().train()
    batch = next(iter(sampler().epoch(tissue(), torch.Generator().manual_seed(0))))
    told = net.embed(batch.tokens)
    for factor in (0.02, 50.0):
        deeper = replace(batch.tokens, depth=factor * batch.tokens.depth)
        torch.testing.assert_close(net.embed(deeper), told)
    batch_loss(net, batch, 0.0, torch.Generator()).backward()
    assert net.depth.weight.grad.abs().max() > 0  # what the depth tells can be learnt


def test_windows_are_compact_and_hold_every_cell_once() -> None:
    positions = np.stack(np.meshgrid(np.arange(30.0), np.arange(20.0)), -1).reshape(-1, 2).astype(np.float32)
    rows = np.arange(600)[::2]
    parts = windows(positions, rows, 5, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    assert {len(part) for part in parts} == {60}
    # A random fifth of the cells would spread like all of them.
    spread = [positions[part].std(axis=0).prod() for part in parts]
    assert max(spread) < 0.5 * positions[rows].std(axis=0).prod()


def test_the_graph_between_tokens_is_that_of_the_field_of_view() -> None:
    first, second, _ = tissue()
    pieces = [(first.fov, torch.arange(0, first.fov.n_cells, 2)), (second.fov, torch.tensor([5, 1, 3, 8]))]
    edges = {tuple(edge) for edge in token_graph(pieces).T.tolist()}
    owner = [(0, int(i)) for i in pieces[0][1]] + [(1, int(i)) for i in pieces[1][1]]
    graphs = [{tuple(edge) for edge in piece[0].edge_index.T.tolist()} for piece in pieces]
    expected = {
        (i, j) for i, (f, a) in enumerate(owner) for j, (g, b) in enumerate(owner) if f == g and (a, b) in graphs[f]
    }
    assert edges == expected
    assert edges


def test_batches_of_windows_carry_their_graph() -> None:
    data = tissue()
    batches = list(sampler(windows=True, graph=True).epoch(data, torch.Generator().manual_seed(1)))
    assert sum(len(b.tokens.depth) for b in batches) == 90
    assert all(b.tokens.edge_index is not None and b.tokens.edge_index.max() < len(b.tokens.depth) for b in batches)


def test_a_schedule_moves_within_an_epoch_too() -> None:
    rates = MaskingSchedule(tokens=1.0, features=(0.0, 1.0), thinning=(0.3, 0.7))
    take = sampler(corruptions=("bilevel",), rates=rates, tokens_per_step=None)
    data = tissue(n=900, n_fovs=3)

    def hidden(progress: tuple[float, float]) -> list[float]:
        batches = take.epoch(data, torch.Generator().manual_seed(0), progress)
        return sorted(1 - b.tokens.visible.float().mean().item() for b in batches)

    assert hidden((0.0, 1.0)) == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=0.03)
    assert hidden((0.5, 0.5)) == pytest.approx([0.5] * 3, abs=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": "nb"},
        {"decoder": "zinb", "posterior": False, "wide": True},
        {"decoder": "nb", "dispersion": "entry"},
        {"decoder": "gaussian", "posterior": False},
        {"variational": True},
        {"perceptron": True, "n_layers": 0, "n_latent": 16, "posterior": False},
    ],
)
def test_what_is_decoded_under_autocast_has_single_precision(changes: dict[str, object]) -> None:
    net = awake(network(**changes))
    tokens = sampler().whole(tissue()[0])
    expected = net(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(tokens)
    for full, half in zip(vars(expected.decoded).values(), vars(found.decoded).values(), strict=True):
        if full is not None:
            assert half.dtype == torch.float32
            torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    assert not torch.equal(found.decoded.expression, expected.decoded.expression)
    if changes.get("decoder") != "gaussian":
        torch.testing.assert_close(net.decoder.share(found.decoded).sum(1), torch.ones(len(tokens.depth)))


# --- the perceptron ---------------------------------------------------------------------------------------------------


def perceptron(**changes) -> Network:
    sizes = {"n_layers": 0, "n_latent": 16, "posterior": False, "perceptron": True}
    return network(**sizes | changes)


def test_a_perceptron_has_one_hidden_layer() -> None:
    net = perceptron()
    tokens = sampler().whole(tissue()[0])
    x = net.embed(tokens)
    hidden = net.latent(torch.relu(torch.nn.functional.layer_norm(x, (16,))))
    logits = net.decoder.logits(torch.relu(torch.nn.functional.layer_norm(hidden, (16,))))
    found = net(tokens)
    torch.testing.assert_close(found.decoded.expression, torch.softmax(logits, dim=1))
    torch.testing.assert_close(found.latent, hidden)
    weights = dict(net.named_parameters())
    found.decoded.expression[:, 0].sum().backward()
    unused = {name for name, weight in weights.items() if weight.grad is None}
    assert unused == {"hidden_token", "decoder.log_concentration"} & set(weights)


@pytest.mark.parametrize("changes", [{"decoder": "zinb"}, {"decoder": "gaussian"}, {"posterior": True}, {"hops": 0}])
def test_a_perceptron_goes_with_all_decoders(changes: dict[str, object]) -> None:
    net, tokens = perceptron(**changes), sampler().whole(tissue()[0])
    if "hops" in changes:
        tokens = replace(tokens, values=tokens.values[:1])
    share = net.decoder.share(net(tokens).decoded)
    torch.testing.assert_close(share.sum(1), torch.ones(len(share)))


def test_dropout_of_a_perceptron_is_that_of_the_generator_alone() -> None:
    """Other networks, trained at the same time, draw from the global one."""
    net, tokens = perceptron().train(), sampler().whole(tissue()[0])
    before = torch.get_rng_state()
    one, same, other = (net(tokens, torch.Generator().manual_seed(seed)).decoded.expression for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert torch.equal(net.eval()(tokens).decoded.expression, net(tokens).decoded.expression)


def test_dropout_keeps_the_mean() -> None:
    x = torch.full((400, 500), 2.0)
    found = perceptron().train()._rectified(x, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 2.5}
    assert found.mean().item() == pytest.approx(2.0, abs=0.02)
    assert torch.equal(perceptron()._rectified(-x, None), torch.zeros_like(x))
