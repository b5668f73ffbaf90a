"""Presets and "auto": the light names agree with the registries, and explicit arguments win."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from spaformer_sc import _config
from spaformer_sc._config import PAPER, Settings, Training, resolve, with_missing
from spaformer_sc.nn.decoders import DECODERS, NegativeBinomialDecoder
from spaformer_sc.nn.encoder import ENCODERS, GRAPH_ENCODERS
from spaformer_sc.nn.masking import CORRUPTIONS
from spaformer_sc.positional import POSITIONAL

AUTO = dict(
    preset="default", quality="default", positional="auto", encoder="auto", decoder="auto", variational=False,
    masking="auto", n_latent=None, max_epochs=None,
)  # fmt: skip


def test_the_names_are_those_of_the_registries() -> None:
    assert set(_config.ENCODERS) == set(ENCODERS)
    assert set(_config.DECODERS) == set(DECODERS)
    assert set(_config.MASKINGS) == set(CORRUPTIONS)
    assert set(_config.POSITIONAL) == set(POSITIONAL)
    dispersed = {name for name, decoder in DECODERS.items() if issubclass(decoder, NegativeBinomialDecoder)}
    assert set(_config.DISPERSED) == dispersed


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("dispersion", _config.DISPERSIONS)
def test_a_dispersion_is_refused_by_decoders_without_one(decoder: str, dispersion: str) -> None:
    given = {**AUTO, "decoder": decoder, "settings": {"dispersion": dispersion}}
    if dispersion == "gene" or decoder in ("nb", "zinb"):
        assert resolve(**given).dispersion == dispersion
    else:
        with pytest.raises(ValueError, match=f"'dispersion'.*decoder='{decoder}'.*nb, zinb"):
            resolve(**given)


def test_explicit_arguments_win_over_the_preset() -> None:
    settings = resolve(**{**AUTO, "preset": "paper", "decoder": "nb", "positional": None, "masking": "tokens",
                          "n_latent": 7, "max_epochs": 3})  # fmt: skip
    assert (settings.decoder, settings.positional, settings.masking) == ("nb", (), ("tokens",))
    assert (settings.n_latent, settings.training.max_epochs) == (7, 3)
    assert (settings.dropout, settings.n_layers, settings.n_heads, settings.dim) == (0.2, 2, 8, 128)


def test_the_paper_preset_is_the_paper() -> None:
    paper = resolve(**{**AUTO, "preset": "paper"})
    assert paper == PAPER
    assert (paper.decoder, paper.positional, paper.masking, paper.n_latent) == (
        "gaussian",
        ("signnet",),
        ("bilevel",),
        20,
    )
    assert (paper.training.learning_rate, paper.training.weight_decay, paper.model_sum) == (1e-3, 5e-4, 250.0)
    assert (paper.training.masked_tokens, paper.training.masked_features, paper.n_eigenvectors) == (0.5, 0.5, 10)


def test_the_gaussian_decoder_is_not_trained_on_thinned_targets() -> None:
    assert resolve(**{**AUTO, "decoder": "gaussian"}).masking == ("bilevel",)
    assert resolve(**{**AUTO, "decoder": "gaussian", "masking": "thinning"}).masking == ("thinning",)


@pytest.mark.parametrize("masking", ["bilevel", "tokens", ["features", "tokens"], None])
def test_the_posterior_is_off_where_nothing_teaches_it(masking: object) -> None:
    assert not resolve(**{**AUTO, "masking": masking}).posterior
    assert resolve(**{**AUTO, "masking": masking}, settings={"posterior": True}).posterior
    assert resolve(**{**AUTO, "masking": ["bilevel", "thinning"]}).posterior


def test_unmeasured_entries_add_feature_masking_to_an_automatic_choice_only() -> None:
    auto, chosen = resolve(**AUTO), resolve(**{**AUTO, "masking": "thinning"})
    assert with_missing(auto, "features").masking == ("thinning", "features")
    assert with_missing(auto, "genes").masking == ("thinning", "genes")
    assert with_missing(auto, None) == auto
    assert with_missing(chosen, "features") == chosen


@pytest.mark.parametrize("quality", ["fast", "default", "best"])
def test_settings_survive_json(quality: str) -> None:
    settings = resolve(**{**AUTO, "quality": quality, "positional": ["laplacian", "signnet"]})
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("argument", "value"),
    [("preset", "papers"), ("quality", "good"), ("encoder", "transformer"), ("decoder", "normal"),
     ("masking", ["thinning", "thinning"]), ("positional", ["laplacian", "rope"])],
)  # fmt: skip
def test_unknown_choices_name_the_argument(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{argument}="):
        resolve(**{**AUTO, argument: value})


def test_advanced_settings_reach_model_and_training() -> None:
    given = {"hops": 0, "dispersion": "entry", "masked_tokens": [0.1, 0.6], "windows": True, "patch_size": 50}
    settings = resolve(**{**AUTO, "decoder": "nb"}, settings=given)
    assert (settings.hops, settings.dispersion, settings.patch_size) == (0, "entry", 50.0)
    assert (settings.training.masked_tokens, settings.training.windows) == ((0.1, 0.6), True)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_every_field_without_an_argument_is_an_advanced_setting() -> None:
    arguments = {"encoder", "decoder", "positional", "variational", "masking", "masking_is_auto", "n_latent",
                 "training", "max_epochs"}  # fmt: skip
    assert set(_config.ADVANCED) == {f.name for c in (Settings, Training) for f in fields(c)} - arguments


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [({"hop": 1}, ValueError, "hops"), ({"hops": 3}, ValueError, "0, 1, 2"), ({"hops": 1.5}, TypeError, "hops"),
     ({"dropout": -0.1}, ValueError, "dropout"), ({"dropout": float("nan")}, ValueError, "dropout"),
     ({"posterior": "yes"}, TypeError, "posterior"), ({"dispersion": "cell"}, ValueError, "gene_fov"),
     ({"forms": []}, TypeError, "one or more of plain"), ({"forms": ["perceptron"]}, ValueError, "another form"),
     ({"forms": ["plain", "perceptron", "wide"]}, ValueError, "`perceptron` last"),
     ({"thinning": [0.7, 0.3]}, ValueError, "thinning"), ({"thinning": 0.5}, TypeError, "pair"),
     ({"masked_tokens": [0, 2]}, ValueError, "masked_tokens"), ({"dim": 100}, ValueError, "multiple of n_heads"),
     ({"schedule": "step"}, ValueError, "cosine"), ({"n_steps": 0}, ValueError, "n_steps"), ([1], TypeError, "dict")],
)  # fmt: skip
def test_an_advanced_setting_that_cannot_be_is_refused(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(**AUTO, settings=given)


def test_the_page_of_settings_lists_each_with_its_defaults() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    shown = {m[1]: (m[2], m[3]) for m in re.finditer(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", page, re.MULTILINE)}
    assert set(shown) == set(_config.ADVANCED)

    def plain(text: str) -> object:
        return None if text == "none" else json.loads(text.strip("`"))

    for settings, column in ((Settings(), 0), (PAPER, 1)):
        values = settings.to_dict() | settings.to_dict()["training"]
        for name, texts in shown.items():
            if texts[column] != "–":
                assert plain(texts[column]) == values[name], name


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [({"masking": "bilevel"}, {"masked_tokens": 0}, "hides nothing"),
     ({"masking": "features"}, {"masked_features": (0, 0)}, "hides nothing"),
     ({"max_epochs": 3}, {"n_steps": 50}, "give one of them"),
     ({"decoder": "gaussian"}, {"posterior": True}, "decoder of counts"),
     ({"encoder": "gat"}, {"windows": False}, "leave `windows` out"),
     ({}, {"encoder": "mlp"}, "argument of its own"), ({}, {"quality": "fast"}, "argument of its own"),
     ({}, {"hop": 1}, "Did you mean 'hops'")],
)  # fmt: skip
def test_choices_that_contradict_each_other_are_refused(arguments: dict, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**{**AUTO, **arguments}, settings=given)


def test_a_schedule_may_start_at_nothing_hidden() -> None:
    assert resolve(**{**AUTO, "masking": "bilevel"}, settings={"masked_tokens": (0, 0.6)})


@pytest.mark.parametrize("choice", [{"encoder": "gat"}, {"positional": ["linear", "conditional"]}])
def test_what_reads_the_graph_gets_windows_and_says_so(choice: dict) -> None:
    assert resolve(**{**AUTO, **choice}).training.windows
    assert not resolve(**AUTO).training.windows


def test_what_reads_the_graph_is_what_the_registries_say() -> None:
    reading = {name for name, encoding in POSITIONAL.items() if encoding.needs_tokens}
    assert GRAPH_ENCODERS | reading == _config.READ_THE_GRAPH
