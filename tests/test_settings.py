"""Defaults of a session, `sf.settings`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import spaformer_sc as sf
from spaformer_sc import _settings
from spaformer_sc._cache import Cache, remembered
from spaformer_sc.datasets import _download
from spaformer_sc.model import resolve_device

LOGGER = logging.getLogger("spaformer_sc")


@pytest.fixture(autouse=True)
def settings():
    """The settings, which are put back after the test."""
    before = dict(vars(sf.settings)), LOGGER.level, list(LOGGER.handlers), remembered.capacity
    yield sf.settings
    vars(sf.settings).update(before[0])
    LOGGER.setLevel(before[1])
    LOGGER.handlers[:] = before[2]
    remembered.resize(before[3])


def test_defaults_and_how_they_are_shown(settings, monkeypatch):
    monkeypatch.setenv("SPAFORMER_SC_DATA", "/data/sets")
    assert (settings.device, settings.progress, settings.cache_size) == ("auto", True, 256)
    assert settings.cache_dir == Path("/data/sets")
    shown = repr(settings).splitlines()
    assert shown[0] == "spaformer_sc settings"
    assert [line.split(maxsplit=1) for line in shown[2:]] == [
        ["device", "'auto'"],
        ["progress", "True"],
        ["cache_dir", "'/data/sets'"],
        ["cache_size", "256 MiB"],
    ]
    assert set(dir(settings)) == {"cache_dir", "cache_size", "device", "progress", "verbosity"}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("verbosity", "loud", ValueError, "`settings.verbosity='loud'` is not allowed; choose one of 'error'"),
        ("verbosity", "inf", ValueError, "Did you mean 'info'"),
        ("verbosity", 4, ValueError, "`settings.verbosity=4` is not allowed"),
        ("verbosity", True, ValueError, "`settings.verbosity=True` is not allowed"),
        ("device", "quantum", ValueError, "`settings.device='quantum'` cannot be used here"),
        ("device", 3, TypeError, "`settings.device=3` must be a string"),
        ("progress", 1, TypeError, "`settings.progress=1` must be True or False"),
        ("cache_size", -1, ValueError, "`settings.cache_size=-1` must be a finite number"),
        ("cache_size", "much", TypeError, "`settings.cache_size='much'` must be a number"),
        ("cache_dir", 3, TypeError, "`settings.cache_dir=3` must be a path or None"),
        ("cache_dir", __file__, ValueError, "is a file; name a folder"),
        ("verbose", 2, AttributeError, "`settings` has no `verbose`. Did you mean 'verbosity'"),
    ],
)
def test_what_is_refused_changes_nothing(settings, name, value, error, message):
    before = repr(settings)
    with pytest.raises(error) as raised:
        setattr(settings, name, value)
    assert message in str(raised.value)
    assert repr(settings) == before


@pytest.mark.parametrize(
    ("value", "name", "shown"),
    [("error", "error", 1), (0, "error", 1), (1, "warning", 2), ("info", "info", 3), (2, "info", 3), (3, "debug", 4)],
)
def test_verbosity_is_the_level_of_the_logger(settings, capsys, monkeypatch, value, name, shown):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    settings.verbosity = value
    settings.verbosity = value
    assert settings.verbosity == name
    for level in ("error", "warning", "info", "debug"):
        getattr(LOGGER, level)("of level %s", level)
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_messages_are_not_shown_twice_where_there_is_logging(settings, capsys, caplog):
    settings.verbosity = "info"
    LOGGER.info("once")
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["once"]


def test_nothing_is_installed_before_verbosity_is_set():
    code = (
        "import logging, spaformer_sc as sf; sf.settings.verbosity; print(logging.getLogger('spaformer_sc').handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_is_the_device_of_the_settings(settings):
    settings.device = "cpu:0"  # a name of the CPU that nothing chooses by itself
    assert str(resolve_device("auto")) == "cpu:0"
    assert str(resolve_device("cpu")) == "cpu"
    model = sf.SpaFormer()
    assert model.device == "cpu:0"
    assert sf.SpaFormer(device="cpu").device == "cpu"
    settings.device = "auto"
    assert str(resolve_device("auto")) in ("cpu", "cuda")
    assert sf.SpaFormer().device == "auto"
    assert model.device == "cpu:0"


def test_progress_that_is_given_wins(settings, fitted, tmp_path):
    fitted.save(tmp_path / "model")
    for value in (True, False):
        settings.progress = np.bool_(value)
        assert settings.progress is value
        assert sf.SpaFormer().progress is value
        assert sf.SpaFormer(progress=not value).progress is not value
        assert sf.SpaFormer.load(tmp_path / "model").progress is value
        assert sf.SpaFormer.load(tmp_path / "model", progress=not value).progress is not value


def test_impute_is_silent_if_the_settings_say_so(settings, tissue, capfd):
    settings.progress = False
    sf.tl.impute(tissue, library_key="fov", quality="fast", max_epochs=1)
    assert "training" not in capfd.readouterr().err


def test_downloads_go_where_the_settings_say(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("SPAFORMER_SC_DATA", str(tmp_path / "environment"))
    assert _download._cache_folder(None) == tmp_path / "environment"
    settings.cache_dir = tmp_path / "mine"
    assert _download._cache_folder(None) == settings.cache_dir == tmp_path / "mine"
    assert _download._cache_folder(tmp_path / "given") == tmp_path / "given"
    settings.cache_dir = "~/mine"
    assert settings.cache_dir == Path(os.path.expanduser("~/mine"))
    settings.cache_dir = None
    assert settings.cache_dir == tmp_path / "environment"
    assert not list(tmp_path.iterdir())


def test_a_smaller_cache_forgets(settings):
    cache = Cache(4 * _settings.MIB)
    for value in range(3):
        cache(np.full, 2**17, float(value))  # 1 MiB each
    assert len(cache._kept) == 3
    cache.resize(2 * _settings.MIB + 2**19)
    assert [entry[0][0] for entry in cache._kept.values()] == [1.0, 2.0]
    settings.cache_size = 0
    remembered(np.full, 100, 1.0)
    assert remembered.capacity == remembered.n_bytes == 0
