"""No NaN or infinity leaves the model, whatever the data; a fit that diverges ends with weights that were good."""

from __future__ import annotations

import logging
import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc._config import PRESETS, TARGET_SUMS, Training
from spaformer_sc.nn.decoders import DECODERS
from spaformer_sc.nn.encoder import ENCODERS
from spaformer_sc.positional import POSITIONAL
from spaformer_sc.training import trainer
from spaformer_sc.training.trainer import Diverged
from tests.conftest import contents
from tests.test_training import run

QUICK = {"library_key": "fov", "quality": "fast", "max_epochs": 2, "progress": False}
N, G = 60, 12


# --- data -------------------------------------------------------------------------------------------------------------


def made(change=None, fovs=None, positions=None):
    """Poisson counts (60 cells, 12 genes) in three fields of view, with `change` applied to counts and positions."""
    rng = np.random.default_rng(0)
    counts, xy = rng.poisson(1.0, (N, G)).astype(np.float32), rng.uniform(0, 100, (N, 2))
    if change is not None:
        change(counts)
    if positions is not None:
        positions(xy)
    labels = np.repeat([0, 1, 2], N // 3) if fovs is None else np.asarray(fovs)
    adata = ad.AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame({"fov": pd.Categorical(labels.astype(str))}, index=[f"cell{i}" for i in range(N)]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(G)]),
        obsm={"spatial": xy},
    )
    return adata


def put(*where):
    """A function that sets parts of an array, given as pairs of index and value."""

    def change(array):
        for index, value in where:
            array[index] = value

    return change


def few_and_many(counts):
    """A cell of one count, one of 100,000 in all genes, and one of 100,000 in a single gene."""
    counts[:3] = 0
    counts[0, 3], counts[1], counts[2, 5] = 1, 100_000 // G, 100_000


def far_above_the_others(counts):
    """A gene of mean 1e6 beside genes of mean 1e-3 and less."""
    rng = np.random.default_rng(1)
    counts[:] = rng.poisson(1e-3, counts.shape)
    counts[:, 0] = rng.poisson(1e6, N)


EVERY = slice(None)
FIELDS = {
    "one cell and two": lambda: made(fovs=[0, 1, 1, *[2] * (N - 3)]),
    "cells alone": lambda: made(fovs=[*range(12), *[12] * (N - 12)]),
    "all in one place": lambda: made(positions=put((slice(20), 7.0))),
    "on a line": lambda: made(positions=put(((EVERY, 1), 0.0))),
    "in parts": lambda: made(positions=lambda xy: np.add(xy, 1e6 * (np.arange(N) % 2)[:, None], out=xy)),
    "at the ends of the range": lambda: made(positions=lambda xy: np.multiply(xy, 1e15 / np.abs(xy).max(), out=xy)),
}
COUNTS = {
    "1 and 100,000": lambda: made(few_and_many),
    "a gene in one cell": lambda: made(put(((EVERY, 4), 0), ((7, 4), 3))),
    "one gene has all": lambda: made(put(((EVERY, slice(1, G)), 0))),
    "one cell has all": lambda: made(put((slice(1, N), 0), (0, 50))),
    "means of 1e6 and 1e-3": lambda: made(far_above_the_others),
    "all of millions": lambda: made(lambda counts: np.multiply(counts, 1e6, out=counts)),
    "the largest": lambda: made(put(((3, 4), 2.0**29), ((5, 6), 1e9))),
    "all the same": lambda: made(put((EVERY, 2))),
}
EVERYTHING = FIELDS | COUNTS
LARGEST = {"all of millions", "the largest"}
"""What intervals, which are found count by count, take too long for."""


# --- what may be written ----------------------------------------------------------------------------------------------


def numbers(value, place="uns"):
    """All numbers of a nested record, with their places."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{place}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, place)
    elif isinstance(value, float):
        yield place, value


def look_through(adata, key="spaformer"):
    """Everything that was written is finite where it has to be, nowhere infinite, and of the right sign."""
    assert np.isfinite(adata.layers[key]).all()
    assert (adata.layers[key] >= 0).all()
    seen = adata.obs[f"{key}_depth"].to_numpy() > 0
    if f"{key}_sd" in adata.layers:
        assert np.isfinite(adata.layers[f"{key}_sd"][seen]).all()
        assert (adata.layers[f"{key}_sd"][seen] >= 0).all()
        assert np.isnan(adata.layers[f"{key}_sd"][~seen]).all()
    assert np.isfinite(adata.obsm[f"X_{key}"]).all()
    assert np.isfinite(adata.obs[f"{key}_depth"]).all()
    assert (adata.obs[f"{key}_depth"] >= 0).all()

    genes = adata.var.filter(like=key).rename(columns=lambda name: name.removeprefix(f"{key}_"))
    cells = adata.obs.filter(like=key).rename(columns=lambda name: name.removeprefix(f"{key}_"))
    record = adata.uns[key]
    told = genes["held_out"] >= 10
    assert not cells["reliability"].isna().any()
    assert not genes["reliability"].isna().any()
    for frame in (genes, cells):
        floats = frame.select_dtypes("float")
        assert not np.isinf(floats).any(axis=None), floats.columns[np.isinf(floats).any()]
        for name in floats:
            if name.endswith("_se"):
                assert not (floats[name] < 0).any(), name
    for name in ("deviance_explained", "gain", "gain_over_baseline"):
        assert genes.loc[told, name].notna().all(), name
        assert genes.loc[genes["held_out"] == 0, name].isna().all(), name
    assert genes[["pearson", "true_correlation"]].stack().dropna().between(-1, 1).all()
    assert (genes["deviance_explained"].dropna() <= 1).all()
    params = adata.uns[key]["params"]
    leads_back = params["output"] == "lognorm" and params["model"]["decoder"] != "gaussian"
    assert genes["dispersion"].notna().all() == leads_back
    assert not (genes["dispersion"] < 0).any()

    assert not [place for place, value in numbers(record) if math.isinf(value)]
    for part in ("params", "posterior", "history"):
        found = [place for place, value in numbers(record[part], part) if math.isnan(value)]
        assert not found or (found == ["history/validation"] * len(found) and not genes["held_out"].any()), found


def ask(adata):
    """Intervals, draws and probabilities of all entries are in their range; rates of cells without counts are NaN."""
    genes = list(adata.var_names)
    seen = adata.obs["spaformer_depth"].to_numpy() > 0
    for of in sf.tl._uncertainty.OF:
        found = sf.tl.interval(adata, genes, of=of)
        drawn = sf.tl.sample(adata, genes, n=2, of=of)
        for values in (found.lower, found.upper, *drawn):
            assert np.isfinite(values[seen]).all()
            assert (values[seen] >= 0).all()
            assert not values[~seen].any() if of == "count" else np.isnan(values[~seen]).all()
        assert (found.lower[seen] <= found.upper[seen]).all()
    for capture in (1e-6, 5.0, 1e6):
        chance = sf.tl.detection(adata, genes, capture=capture)
        assert ((chance >= 0) & (chance <= 1)).all()


def impute(adata, **arguments):
    """Impute with `QUICK` arguments, and look through what was written."""
    sf.tl.impute(adata, **{**QUICK, **arguments})
    look_through(adata)
    return adata


# --- data at their extremes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "output"),
    [
        *((data, "lognorm") for data in EVERYTHING),
        *((data, output) for data in COUNTS for output in ("counts", "rate")),
    ],
)
def test_any_data_in_every_scale(data, output):
    adata = impute(EVERYTHING[data](), output=output, sd=True)
    if data not in LARGEST:
        ask(adata)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("data", ["1 and 100,000", "means of 1e6 and 1e-3"])
def test_any_likelihood(data, decoder, precision):
    settings = {"precision": precision, "dim": 32, "n_heads": 4}
    adata = impute(COUNTS[data](), decoder=decoder, settings=settings, sd=decoder != "gaussian", variational=True)
    assert adata.uns["spaformer"]["params"]["training"]["precision"] == precision
    if decoder != "gaussian":
        ask(adata)


@pytest.mark.parametrize("data", FIELDS)
def test_any_positional_encoding(data):
    """All encodings at once: a number that is not finite in one is so in the sum."""
    adata = impute(FIELDS[data](), positional=list(POSITIONAL))
    assert adata.uns["spaformer"]["params"]["model"]["positional"] == list(POSITIONAL)


@pytest.mark.parametrize("name", POSITIONAL)
def test_a_positional_encoding_of_cells_without_edges(name):
    impute(FIELDS["cells alone"](), positional=name, settings={"precision": "bf16"})
    impute(FIELDS["in parts"](), positional=name, graph="radius", radius=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_encoder_of_cells_without_edges(encoder):
    impute(FIELDS["cells alone"](), encoder=encoder)
    impute(COUNTS["means of 1e6 and 1e-3"](), encoder=encoder, graph="radius", radius=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("data", [*FIELDS, "1 and 100,000", "means of 1e6 and 1e-3", "one cell has all"])
def test_any_preset(data, preset):
    impute(EVERYTHING[data](), preset=preset)


def test_many_networks_of_data_at_their_extremes():
    ask(impute(COUNTS["1 and 100,000"](), quality="default"))


HIDDEN = {
    "a gene everywhere": (EVERY, 2),
    "genes of a field of view": (slice(20), slice(6)),
    "a cell": (5, EVERY),
    "all but one gene": (slice(20), slice(1, G)),
    "all but one cell": (slice(1, N), slice(6)),
    "here and there": (np.arange(N), np.arange(N) % G),
    "the gene with nearly all counts": (slice(20), 0),
}


@pytest.mark.parametrize("output", ["lognorm", "counts", "rate"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_entries_that_are_missing(hidden, output):
    adata = made(lambda counts: np.multiply(counts[:, 0], 1000, out=counts[:, 0]))
    adata.layers["hidden"] = np.zeros(adata.shape, dtype=bool)
    adata.layers["hidden"][HIDDEN[hidden]] = True
    ask(impute(adata, missing="hidden", output=output, sd=True))


@pytest.mark.parametrize("decoder", DECODERS)
def test_other_data_than_those_of_the_fit(decoder):
    model = sf.SpaFormer(**QUICK, decoder=decoder, positional="mlp").fit(made())
    for data in ("at the ends of the range", "means of 1e6 and 1e-3", "the largest"):
        adata = EVERYTHING[data]()
        for output in ("lognorm", "counts", "rate"):
            expression = model.impute(adata, output=output)
            assert np.isfinite(expression).all()
            assert (expression >= 0).all()
        assert np.isfinite(model.embed(adata)).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target_sum", TARGET_SUMS)
def test_the_least_and_the_largest_depth(decoder, target_sum):
    for output in ("lognorm", "rate"):
        adata = impute(
            made(), decoder=decoder, output=output, target_sum=target_sum, settings={"model_sum": target_sum}
        )
        if decoder != "gaussian":
            ask(adata)


@pytest.mark.parametrize("target_sum", [1e-7, 1e13, 1e300])
def test_depths_that_single_precision_does_not_hold_are_refused(target_sum, no_training):
    for wrong in ({"target_sum": target_sum}, {"settings": {"model_sum": target_sum}}):
        with pytest.raises(ValueError, match=r"_sum.* must be a finite number, from 1e-06 to 1e\+12"):
            impute(made(), **wrong)


def test_a_prediction_that_is_not_finite_does_not_leave_the_model(fitted, shared_tissue, monkeypatch):
    scaled = fitted._scaled
    monkeypatch.setattr(type(fitted), "_scaled", staticmethod(lambda *given: scaled(*given) / torch.zeros(1)))
    with pytest.raises(ValueError, match="predicted of the field of view 'fov1' is not finite"):
        fitted.impute(shared_tissue)


# --- a fit that diverges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("rate", [1e8, 1e37])
def test_a_fit_that_diverges_at_once_says_what_to_do(tissue, decoder, rate):
    before = contents(tissue)
    with pytest.raises(RuntimeError, match=r"before anything was learnt\..*settings=\{'learning_rate': 0\.002\}"):
        impute(tissue, decoder=decoder, settings={"learning_rate": rate}, max_epochs=30)
    assert contents(tissue) == before


def test_weights_that_are_finite_and_no_more_are_said_so(tissue, caplog):
    with caplog.at_level(logging.WARNING):
        impute(tissue, decoder="poisson", settings={"learning_rate": 2e3}, max_epochs=30)
    assert "the last good weights" in caplog.text
    assert "not shown to be better" in caplog.text


def becoming(change, first):
    """The loss, changed by a function of it and the network from call number `first` on."""
    original, calls = trainer.batch_loss, 0

    def batch_loss(network, *rest):
        nonlocal calls
        calls += 1
        loss = original(network, *rest)
        return change(loss, network) if calls >= first else loss

    return batch_loss


def gradient_of_nan(loss, network):
    """The same loss with a gradient that is NaN, which makes all weights NaN."""
    weight = network.embedding.weight
    return loss + (weight - weight.detach()).abs().sqrt().sum()


BAD = {
    "NaN": lambda loss, network: loss * math.nan,
    "infinite": lambda loss, network: loss + math.inf,
    "gradient": gradient_of_nan,
}
TOLD = {"held out": lambda network: 1.0, "nothing held out": lambda network: math.nan}


@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("bad", BAD)
def test_the_last_good_weights_are_kept(monkeypatch, caplog, bad, told, averaging):
    monkeypatch.setattr(trainer, "batch_loss", becoming(BAD[bad], 8))
    seen = []

    def validate(network):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        finite = all(bool(value.isfinite().all()) for value in network.parameters())
        score = TOLD[told](network)
        return -math.inf if not finite and score == 1 else score + len(seen)

    with caplog.at_level(logging.WARNING):
        best, history = run(Training(max_epochs=10, n_validations=15, averaging=averaging), validate)
    # Validated after steps 2, 4 and 6; the loss of step 8, which follows that of step 7, is the first that is bad.
    assert history.step == [2, 4, 6]
    assert all(len(entries) == 3 for entries in vars(history).values())
    for name, value in best.state_dict().items():
        assert torch.equal(value, seen[2][name]), name
    assert "training diverged at step" in caplog.text
    assert "of step 6, are kept." in caplog.text
    assert "settings={'learning_rate': 0.0002}" in caplog.text


def test_weights_that_give_a_bad_loss_are_not_good(monkeypatch):
    monkeypatch.setattr(trainer, "batch_loss", becoming(BAD["NaN"], 7))
    seen = []

    def validate(network):
        seen.append(network.embedding.weight.detach().clone())
        return float(len(seen))

    best, history = run(Training(max_epochs=10, n_validations=15), validate)
    assert history.step == [2, 4]
    assert torch.equal(best.embedding.weight, seen[1])


@pytest.mark.parametrize("score", [-math.inf, math.nan])
def test_without_good_weights_there_is_an_error(monkeypatch, score):
    monkeypatch.setattr(trainer, "batch_loss", becoming(gradient_of_nan, 1))
    with pytest.raises(Diverged, match=r"diverged at step [12], before anything was learnt"):
        run(Training(max_epochs=10, n_validations=15), lambda network: score)


def test_the_last_step_is_watched_too(monkeypatch, caplog):
    steps = 3 * 4
    monkeypatch.setattr(trainer, "batch_loss", becoming(gradient_of_nan, steps))
    with caplog.at_level(logging.WARNING):
        best, history = run(Training(max_epochs=4, n_validations=3), lambda network: math.nan)
    assert history.step == [4, 8]
    assert "diverged at step 12" in caplog.text
    assert all(bool(value.isfinite().all()) for value in best.parameters())


def test_a_fit_that_diverges_on_its_way_gives_what_it_had(tissue, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "batch_loss", becoming(gradient_of_nan, 15))
    with caplog.at_level(logging.WARNING):
        impute(tissue, max_epochs=10, settings={"tokens_per_step": 60, "n_validations": 10})
    assert "the last good weights" in caplog.text
    assert max(tissue.uns["spaformer"]["history"]["step"]) < 15


@pytest.fixture
def wide_diverges(monkeypatch):
    """Let the networks of one form have no finite loss."""
    original = trainer.batch_loss

    def batch_loss(network, *rest):
        loss = original(network, *rest)
        return loss * math.nan if network.config.wide and network.config.dim == 128 else loss

    def use():
        monkeypatch.setattr(trainer, "batch_loss", batch_loss)

    return use


FIVE = {**QUICK, "quality": "default", "max_epochs": 3}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_network_that_diverges_does_not_spoil_the_others(
    tissue, tmp_path, monkeypatch, caplog, wide_diverges, threads
):
    undisturbed = sf.SpaFormer(**FIVE).fit(tissue)
    wide_diverges()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with caplog.at_level(logging.WARNING):
        model = sf.SpaFormer(**FIVE).fit(tissue)
    torch.set_num_threads(before)
    left = [number for number, form in enumerate(undisturbed._forms) if form != "wide"]
    assert 1 not in left
    assert "are left out: training diverged at step 0" in caplog.text
    assert "wide" not in model._forms
    assert model._forms[:3] == ["plain", "large", "perceptron"]
    for ours, number in zip(model._networks[:3], (0, 2, 3)):
        for name, weight in undisturbed._networks[number].state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), name
    assert len(model._networks) == model._weights.shape[1] == len(model._forms) == 4
    np.testing.assert_allclose(model._weights.sum(axis=1), 1)
    assert set(model.history["network"]) == {0.0, 1.0, 2.0, 3.0}

    model.save(tmp_path / "model")
    expression = model.impute(tissue)
    assert np.isfinite(expression).all()
    np.testing.assert_array_equal(sf.SpaFormer.load(tmp_path / "model").impute(tissue), expression)
    monkeypatch.undo()
    assert len(model.fine_tune(tissue)._networks) == 4


def test_a_perceptron_that_alone_does_not_diverge_is_no_model(tissue, monkeypatch):
    """It has no latent that could be shown."""
    original = trainer.batch_loss

    def batch_loss(network, *rest):
        loss = original(network, *rest)
        return loss if network.config.perceptron else loss * math.nan

    monkeypatch.setattr(trainer, "batch_loss", batch_loss)
    with pytest.raises(trainer.Diverged, match="diverged at step 0"):
        sf.SpaFormer(**FIVE).fit(tissue)


def test_the_network_that_follows_has_a_number_of_its_own(tissue, monkeypatch, wide_diverges):
    """Seeds go by number: the fifth network would otherwise be the fourth once more."""
    wide_diverges()
    made = []
    original = sf.SpaFormer._new_network
    monkeypatch.setattr(
        sf.SpaFormer, "_new_network", lambda self, number, form: made.append(number) or original(self, number, form)
    )
    sf.SpaFormer(**FIVE).fit(tissue)
    assert made == [0, 1, 2, 3, 4]
