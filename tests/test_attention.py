"""Attention: against brute force, against each other, and one field of view at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spaformer_sc.nn.attention import (
    ATTENTION,
    ExactAttention,
    GraphAttention,
    PerformerAttention,
    orthogonal_features,
)

DIM, HEADS = 24, 3
KINDS = [
    pytest.param(lambda: ExactAttention(DIM, HEADS), id="exact"),
    pytest.param(lambda: PerformerAttention(DIM, HEADS), id="softmax"),
    pytest.param(lambda: PerformerAttention(DIM, HEADS, kernel="relu"), id="relu"),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, DIM, generator=generator(seed), dtype=dtype)


def seeded(module: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """Give the parameters values that depend on their names' order alone."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator(i), dtype=torch.float64) * scale / math.sqrt(DIM)
            )
    return module.eval()


def brute_force(module: torch.nn.Module, x: Tensor, weights: object) -> Tensor:
    """Attention of one FOV with `weights(q, k)` giving the unnormalised kernel matrix of one head, in double."""
    x = x.double()
    q, k, v = (x @ module.qkv.weight.double().T + module.qkv.bias.double()).split(DIM, dim=1)
    heads = []
    for h in range(HEADS):
        part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        a = weights(q[:, part], k[:, part])
        heads.append(a / a.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(heads, 1) @ module.out.weight.double().T + module.out.bias.double()


def softmax_kernel(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.T / math.sqrt(q.shape[1])).exp()


def test_exact_is_softmax_attention() -> None:
    module, x = seeded(ExactAttention(DIM, HEADS), 2.0), tokens(17)
    torch.testing.assert_close(module(x, [17]).double(), brute_force(module, x, softmax_kernel), rtol=1e-5, atol=1e-5)


def test_performer_softmax_is_the_estimator_of_the_paper() -> None:
    """Equations 4 and 7 written out in double, without any of the rescaling that keeps exponents small."""
    module, x = seeded(PerformerAttention(DIM, HEADS), 2.0), tokens(17)
    omega = module.features.double()

    def phi(u: Tensor) -> Tensor:
        u = u / (DIM // HEADS) ** 0.25
        return torch.exp(u @ omega.T - (u**2).sum(1, keepdim=True) / 2) / math.sqrt(len(omega))

    expected = brute_force(module, x, lambda q, k: phi(q) @ phi(k).T)
    torch.testing.assert_close(module(x, [17]).double(), expected, rtol=1e-5, atol=1e-5)


def test_performer_relu_is_its_kernel() -> None:
    module, x = seeded(PerformerAttention(DIM, HEADS, kernel="relu")), tokens(17)

    def phi(u: Tensor) -> Tensor:
        return (u @ module.features.double().T).clamp_min(0) + 1e-3

    expected = brute_force(module, x, lambda q, k: phi(q) @ phi(k).T)
    torch.testing.assert_close(module(x, [17]).double(), expected, rtol=1e-5, atol=1e-5)


def test_performer_converges_to_exact() -> None:
    exact, x, lengths = seeded(ExactAttention(DIM, HEADS), 0.35), tokens(60), [20, 40]
    target = exact(x, lengths)
    errors = []
    for n_features in (16, 64, 256, 1024, 4096):
        performer = PerformerAttention(DIM, HEADS, n_features=n_features)
        performer.load_state_dict(exact.state_dict(), strict=False)
        draws = []
        for seed in range(8):
            performer.redraw(generator(seed))
            draws.append((performer(x, lengths) - target).pow(2).mean())
        errors.append(torch.stack(draws).mean().sqrt().item() / target.std().item())
    assert all(b < a for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.02, errors
    assert errors[-1] < errors[0] / 8, errors  # 1/√m would be a factor of 16


def test_performer_is_not_biased_for_queries_far_from_all_keys() -> None:
    """A query whose kernel values are all tiny gets the right ratio of them, not an average over all tokens."""
    module = PerformerAttention(2, 1, n_features=20_000).double()
    q = torch.tensor([[6.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[-3.0, 0.0], [-3.0, 0.5], [-2.5, 0.0]], dtype=torch.float64)
    v = torch.eye(3, dtype=torch.float64)
    exact = torch.softmax(q @ k.T / math.sqrt(2), 1)
    estimates = []
    for seed in range(20):
        module.redraw(generator(seed))
        estimates.append(module.attend(q[None, None], k[None, None], v[None, None])[0, 0])
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("make", KINDS)
def test_ragged_batch_equals_one_fov_at_a_time(make: object) -> None:
    module, lengths = seeded(make()), [5, 1, 9, 5, 30, 1, 5, 2]
    x = tokens(sum(lengths))
    alone = torch.cat([module(fov, [len(fov)]) for fov in x.split(lengths)])
    torch.testing.assert_close(module(x, lengths), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", KINDS[1:])
def test_without_gradients_the_result_is_the_same(make: object) -> None:
    module, lengths = seeded(make()), [40, 7, 40]
    x = tokens(sum(lengths))
    found = module(x, lengths).detach()
    with torch.inference_mode():
        torch.testing.assert_close(module(x, lengths), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", KINDS)
def test_extreme_batch_mates_change_nothing(make: object) -> None:
    module, x = seeded(make()), tokens(12)
    alone = module(x, [12])
    together = module(torch.cat([1e3 * tokens(12, 1), x, 1e-3 * tokens(7, 2)]), [12, 12, 7])
    torch.testing.assert_close(together[12:24], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", KINDS)
def test_permuting_tokens_permutes_the_result(make: object) -> None:
    module, x = seeded(make()), tokens(40)
    order = torch.randperm(40, generator=generator(3))
    torch.testing.assert_close(module(x[order], [40]), module(x, [40])[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", KINDS)
def test_single_token_attends_to_itself(make: object) -> None:
    module, x = seeded(make()), tokens(1)
    value = (x @ module.qkv.weight.T + module.qkv.bias)[:, 2 * DIM :]
    torch.testing.assert_close(module(x, [1]), module.out(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("factor", [0.0, 1e-6, 100.0])
def test_extreme_inputs_stay_finite(make: object, factor: float) -> None:
    module = seeded(make())
    x = (factor * tokens(30)).requires_grad_()
    y = module(x, [10, 20])
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_performer_averages_values_with_positive_weights_whatever_the_input() -> None:
    module = PerformerAttention(DIM, HEADS)
    q, k, v = (torch.randn(1, HEADS, 50, DIM // HEADS, generator=generator(i)) for i in range(3))
    result = module.attend(100 * q, 100 * k, v)
    assert (result <= v.amax(2, keepdim=True) + 1e-5).all()
    assert (result >= v.amin(2, keepdim=True) - 1e-5).all()


@pytest.mark.parametrize("make", KINDS)
def test_gradient(make: object) -> None:
    module = seeded(make()).double()
    x = tokens(6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, [2, 4]), x)


@pytest.mark.parametrize("make", KINDS)
def test_autocast_bfloat16_stays_close(make: object) -> None:
    module, x = seeded(make()), tokens(30)
    expected = module(x, [10, 20])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(x, [10, 20])
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)


def test_redraw_changes_the_features_only_and_repeatably() -> None:
    module = PerformerAttention(DIM, HEADS)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    global_state = torch.random.get_rng_state()
    module.redraw(generator(7))
    first = module.features.clone()
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"features"}
    module.redraw(generator(8))
    assert not torch.equal(module.features, first)
    module.redraw(generator(7))
    assert torch.equal(module.features, first)
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_kinds_start_from_the_same_weights() -> None:
    """Drawing random features does not move the random numbers of the weights."""
    states = []
    for name in ("exact", "performer", "performer_relu"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            states.append((dict(ATTENTION[name](DIM, HEADS).named_parameters()), torch.random.get_rng_state()))
    a, end_a = states[0]
    for b, end_b in states[1:]:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert torch.equal(end_a, end_b)


def test_the_registry_knows_both_kernels() -> None:
    kernels = {name: getattr(make(DIM, HEADS), "kernel", None) for name, make in ATTENTION.items()}
    assert kernels == {"performer": "softmax", "performer_relu": "relu", "exact": None, "gat": None}


def graph(n: int, share: float, seed: int = 0) -> Tensor:
    """Symmetric random graph without self-loops in which token 0 has no neighbours."""
    upper = (torch.rand(n, n, generator=generator(seed)) < share).triu(1)
    upper[0] = False
    return (upper | upper.T).nonzero().T


@torch.no_grad()
def test_graph_attention_is_that_of_the_paper() -> None:
    """Equation 7 of Brody et al. 2022 written out cell by cell in double."""
    module, x = seeded(GraphAttention(DIM, HEADS)), tokens(15)
    edge_index = graph(15, 0.25)
    into = {i: sorted({i, *edge_index[0, edge_index[1] == i].tolist()}) for i in range(15)}
    assert into[0] == [0]
    assert max(map(len, into.values())) > 3
    conv, h = module.graph, x.double()
    of_cell = h @ conv.lin_r.weight.double().T + conv.lin_r.bias.double()
    of_neighbour = h @ conv.lin_l.weight.double().T + conv.lin_l.bias.double()
    rows = []
    for i, sources in into.items():
        parts = []
        for head in range(HEADS):
            part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            summed = [of_cell[i, part] + of_neighbour[j, part] for j in sources]
            scores = [float((s.where(s > 0, 0.2 * s) * conv.att[0, head].double()).sum()) for s in summed]
            weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
            parts.append(sum(w * of_neighbour[j, part] for w, j in zip(weights, sources, strict=True)))
        rows.append(torch.cat(parts) + conv.bias.double())
    expected = torch.stack(rows) @ module.out.weight.double().T + module.out.bias.double()
    torch.testing.assert_close(module(x, [15], edge_index).double(), expected, rtol=1e-5, atol=1e-5)


def test_self_loops_in_the_graph_make_no_difference_to_graph_attention() -> None:
    module, x, edge_index = seeded(GraphAttention(DIM, HEADS)), tokens(15), graph(15, 0.25)
    looped = torch.cat([edge_index, torch.arange(6).expand(2, 6)], dim=1)
    torch.testing.assert_close(module(x, [15], looped), module(x, [15], edge_index))


def test_without_edges_graph_attention_maps_each_token_by_itself() -> None:
    module, x = seeded(GraphAttention(DIM, HEADS)), tokens(4)
    value = module.graph.lin_l(x) + module.graph.bias
    torch.testing.assert_close(module(x, [4], torch.empty(2, 0, dtype=torch.int64)), module.out(value))


def test_graph_attention_without_a_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="`edge_index` is None"):
        GraphAttention(DIM, HEADS)(tokens(3), [3])


def test_features_are_orthogonal_in_blocks() -> None:
    features = orthogonal_features(20, 8, generator())
    assert features.shape == (20, 8)
    for block in features.split(8):
        directions = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(block)).double(), rtol=0, atol=1e-12)


def test_features_are_standard_normal_one_by_one() -> None:
    """Means 0, covariance I, and lengths as of Gaussian vectors; 20,000 blocks, limits of five standard errors."""
    n, dim = 20_000, 3
    blocks = orthogonal_features(n * dim, dim, generator()).view(n, dim, dim)
    for row in range(dim):
        x = blocks[:, row]
        assert x.mean(0).abs().max() < 5 / math.sqrt(n)
        assert (x.T @ x / n - torch.eye(dim)).abs().max() < 5 * math.sqrt(2 / n)
    assert abs(blocks.square().sum(-1).var().item() - 2 * dim) < 0.3


def test_default_number_of_features_is_whole_blocks() -> None:
    assert PerformerAttention(128, 8).features.shape == (48, 16)
    assert PerformerAttention(2, 2).features.shape == (1, 1)


def test_dropout_in_training_only() -> None:
    module, x = PerformerAttention(DIM, HEADS, dropout=0.5), tokens(30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = module.train()(x, [30]) == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert not (module.eval()(x, [30]) == 0).any()


@pytest.mark.parametrize("lengths", [[], [3, 3], [8], [7, 0], [10, -3]])
def test_wrong_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="`lengths` must hold positive numbers of tokens that add up to the 7 rows"):
        ExactAttention(DIM, HEADS)(tokens(7), lengths)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`n_heads=5` does not divide `dim=24`"):
        ExactAttention(DIM, 5)
    with pytest.raises(ValueError, match="`n_heads=5` does not divide `dim=24`"):
        GraphAttention(DIM, 5)
    with pytest.raises(ValueError, match="`n_features=0` must be at least 1"):
        PerformerAttention(DIM, HEADS, n_features=0)
    with pytest.raises(ValueError, match="`kernel='cosine'` is unknown"):
        PerformerAttention(DIM, HEADS, kernel="cosine")
