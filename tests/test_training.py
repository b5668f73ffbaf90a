"""The training loop: it learns, stops, keeps the best, and survives divergence."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spaformer_sc._config import Training
from spaformer_sc.data._split import gene_shares, hold_out
from spaformer_sc.metrics import poisson_gain
from spaformer_sc.training import trainer
from spaformer_sc.training.scoring import log_ratios
from spaformer_sc.training.trainer import WeightAverage, learning_rate_factor, train
from tests.test_network import network, sampler, tissue


def silent(step: int, n_steps: int, score: float) -> None:
    pass


def run(config: Training, validate, seed: int = 0, **changes):
    return train(network(**changes), tissue(), sampler(), config, validate=validate, seed=seed, progress=silent)


def test_held_out_parts_add_up_and_have_the_stated_shares() -> None:
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(3.0, (500, 40)).astype(np.float32))
    split = hold_out(counts, validation=0.1, test=0.2, rng=np.random.default_rng(1))
    assert (split.train + split.validation + split.test - counts).nnz == 0
    assert split.validation.sum() / counts.sum() == pytest.approx(0.1, abs=0.005)
    assert split.test.sum() / counts.sum() == pytest.approx(0.2, abs=0.005)
    dense = [m.toarray().ravel() for m in (split.train, split.validation, split.test)]
    # Parts of Poisson counts are independent of each other.
    assert np.abs(np.corrcoef(dense) - np.eye(3)).max() < 0.03


def test_gene_shares_do_not_depend_on_where_a_gene_was_measured() -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(12, 2.0))
    counts = rng.poisson(share * rng.uniform(200, 2000, (900, 1)))
    missing = np.zeros(counts.shape, dtype=bool)
    missing[:300, :3], missing[300:600, 5:9] = True, True
    found = gene_shares(sp.csr_matrix(np.where(missing, 0, counts)), missing)
    np.testing.assert_allclose(found, share, rtol=0.03)
    np.testing.assert_allclose(gene_shares(sp.csr_matrix(counts), None), share, rtol=0.03)


def test_the_stopping_score_is_the_poisson_gain() -> None:
    rng = np.random.default_rng(3)
    train_counts = sp.csr_matrix(rng.poisson(2.0, (60, 15)).astype(np.float32))
    held = sp.csr_matrix(rng.poisson(1.0, (60, 15)).astype(np.float32))
    rates = rng.dirichlet(np.full(15, 5.0), 60).astype(np.float32)
    null = np.asarray(train_counts.sum(0)).ravel() / train_counts.sum()
    entries = held.tocoo()
    ratios = log_ratios(rates, entries.row, entries.col, None, null.astype(np.float32))
    gain = entries.data @ ratios / entries.data.sum()
    assert gain == pytest.approx(poisson_gain(held, rates, train_counts), abs=1e-4)


def test_the_stopping_score_ignores_what_was_not_measured() -> None:
    rng = np.random.default_rng(4)
    null = rng.dirichlet(np.full(10, 5.0)).astype(np.float32)
    rates = rng.dirichlet(np.full(10, 5.0), 30).astype(np.float32)
    measured = np.ones((30, 10), dtype=bool)
    measured[:, 6:] = False
    held = sp.csr_matrix(rng.poisson(1.0, (30, 10)) * measured).astype(np.float32)
    rows, cols = held.nonzero()
    masked = log_ratios(rates, rows, cols, measured, null)
    few = rates[:, :6] / rates[:, :6].sum(1, keepdims=True)
    np.testing.assert_allclose(masked, log_ratios(few, rows, cols, None, null[:6] / null[:6].sum()), atol=1e-5)


def test_training_stops_after_patience_and_keeps_the_best_weights() -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    seen: list[dict[str, torch.Tensor]] = []

    def validate(net) -> float:
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return next(scores)

    config = Training(max_epochs=50, patience=3, n_validations=50)
    best, history = run(config, validate)
    assert history.validation == [0.1, 0.5, 0.4, 0.3, 0.2]
    for name, value in best.state_dict().items():
        assert torch.equal(value, seen[1][name]), name
    assert not torch.equal(seen[1]["embedding.weight"], seen[4]["embedding.weight"])


def test_a_diverging_fit_keeps_the_last_good_weights(monkeypatch, caplog) -> None:
    good = trainer.batch_loss
    calls = 0

    def bad(*args):
        nonlocal calls
        calls += 1
        return good(*args) * (math.nan if calls > 8 else 1.0)

    monkeypatch.setattr(trainer, "batch_loss", bad)
    with caplog.at_level(logging.WARNING):
        best, _ = run(Training(max_epochs=10, n_validations=10), lambda net: 1.0)
    assert "diverged" in caplog.text
    assert all(bool(torch.isfinite(p).all()) for p in best.parameters())


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    config = Training(max_epochs=3)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, _ = run(config, lambda net: 0.0, dropout=0.3, variational=True)
    assert torch.equal(torch.rand(2), expected)
    second, _ = run(config, lambda net: 0.0, dropout=0.3, variational=True)
    other, _ = run(config, lambda net: 0.0, seed=9, dropout=0.3, variational=True)
    weights = [dict(net.named_parameters())["embedding.weight"] for net in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("changes", [{}, {"decoder": "zinb"}, {"decoder": "gaussian", "posterior": False}])
def test_products_of_half_precision_teach_the_same(changes: dict[str, object]) -> None:
    results = [run(Training(max_epochs=6, precision=p), lambda net: 0.0, **changes) for p in ("float32", "bf16")]
    losses = [history.loss for _, history in results]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in results[1][0].parameters())


def test_random_features_are_redrawn() -> None:
    first = network().encoder.layers[0].attention.features.clone()
    trained, _ = run(Training(max_epochs=4, redraw_every=3, averaging=0.9), lambda net: float(len(str(net))))
    kept = run(Training(max_epochs=4, redraw_every=10_000), lambda net: 0.0)[0]
    assert torch.equal(kept.encoder.layers[0].attention.features, first)
    scores = iter(range(100))
    trained, _ = run(Training(max_epochs=4, redraw_every=3), lambda net: float(next(scores)))
    assert not torch.equal(trained.encoder.layers[0].attention.features, first)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = Training(warmup_steps=10)
    factors = [learning_rate_factor(step, 200, config) for step in range(201)]
    assert factors[0] == pytest.approx(0.1, rel=1e-2)
    assert max(factors) == factors[9]
    assert factors[200] == pytest.approx(0.0, abs=1e-12)
    assert all(b <= a for a, b in itertools.pairwise(factors[9:]))
    constant = Training(warmup_steps=10, schedule="constant")
    assert learning_rate_factor(150, 200, constant) == 1.0


def test_weight_average_follows_the_stated_recursion() -> None:
    net = network()
    average = WeightAverage(net, 0.9)
    want = net.embedding.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            net.embedding.weight.add_(1.0)
        average.update(net)
        decay = min(0.9, step / (step + 10))
        want = decay * want + (1 - decay) * net.embedding.weight.detach()
    torch.testing.assert_close(average.network.embedding.weight.detach(), want)
