"""Presets and "auto": the light names agree with the registries, and explicit arguments win."""

from __future__ import annotations

import json

import pytest

from spaformer_sc import _config
from spaformer_sc._config import PAPER, Settings, resolve, with_missing
from spaformer_sc.nn.decoders import DECODERS
from spaformer_sc.nn.encoder import ENCODERS
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


def test_unmeasured_entries_add_feature_masking_to_an_automatic_choice_only() -> None:
    auto, chosen = resolve(**AUTO), resolve(**{**AUTO, "masking": "thinning"})
    assert with_missing(auto, True).masking == ("thinning", "features")
    assert with_missing(auto, False) == auto
    assert with_missing(chosen, True) == chosen


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
