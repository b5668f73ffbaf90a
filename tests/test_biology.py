"""The command that asks whether imputing helps biology: scores with known answers, tables, runs that are resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")


@pytest.fixture
def biology(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import biology

    return biology


@pytest.fixture(scope="module")
def cells():
    """Half of a small tissue, all of it, and cell types."""
    import sys

    sys.path.insert(0, str(BENCHMARKS))
    import biology

    tissue = biology.load("simulated", "cell_type", "fov", 0)
    sys.path.remove(str(BENCHMARKS))
    return tissue


def test_the_input_is_half_of_the_counts(cells) -> None:
    adata, everything, labels = cells
    assert adata.X.sum() == pytest.approx(everything.sum() / 2, rel=0.02)
    assert ((everything - adata.X).data >= 0).all()
    assert len(labels) == adata.n_obs
    assert (adata.obsp["near"].getnnz(axis=1) == 6).all()


def test_labels_themselves_are_a_perfect_representation(biology, cells, monkeypatch: pytest.MonkeyPatch) -> None:
    adata, everything, labels = cells
    monkeypatch.setattr(biology, "clusters", lambda representation, n, seed: representation.argmax(axis=1))
    monkeypatch.setattr(biology, "morans", lambda values, _: np.asarray(values).mean(axis=0))
    rng = np.random.default_rng(0)
    perfect = np.eye(labels.max() + 1)[labels] + 1e-3 * rng.random((len(labels), labels.max() + 1))
    values = biology.lognorm(everything)
    found = biology.score(biology.Result(perfect, values), adata, everything, labels, 0)
    assert found["ari"] == found["nmi"] == pytest.approx(1)
    assert found["purity"] > 0.99
    assert found["moran"] == pytest.approx(1)
    assert found["top"] == 1
    noise = biology.score(biology.Result(rng.random((len(labels), 10)), values), adata, everything, labels, 0)
    assert abs(noise["ari"]) < 0.02
    assert noise["purity"] < 0.5


def test_smoothing_over_borders_is_seen(biology, cells) -> None:
    adata, _, labels = cells
    near = adata.obsp["near"]
    rows, columns = near.nonzero()
    at_border = np.bincount(rows, labels[rows] != labels[columns], len(labels)) > 3
    everyone = np.ones(len(labels), dtype=bool)
    rng = np.random.default_rng(0)
    profiles = rng.random((labels.max() + 1, 40))[labels] + 0.3 * rng.random((len(labels), 40))
    given = labels, near, at_border
    assert abs(biology.towards_neighbours(profiles, everyone, *given)) < 0.05
    smoothed = (profiles + near @ profiles) / 7
    assert biology.towards_neighbours(smoothed, everyone, *given) > 0.4


def test_every_peer_gives_what_is_scored(biology, cells) -> None:
    adata, _, _ = cells
    few = adata[:300].copy()
    for method in ("counts", "neighbours"):
        for name, found in biology.METHODS[method](few, "fov", "fast", 0).items():
            assert biology.METHOD_NAMES[name] == method
            assert found.values.shape == few.shape
            assert found.representation.shape == (300, biology.N_COMPONENTS)
    assert set(biology.METHOD_NAMES.values()) == set(biology.METHODS)


def test_tables_and_runs_that_are_there(biology, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def run(command, **_):
        call = json.loads(command[-1])
        made.append(call["method"])
        scores = dict.fromkeys(biology.SCORES, 0.5) | {"truth": float("nan"), "n_cells": 7, "n_labels": 2}
        names = [name for name, method in biology.METHOD_NAMES.items() if method == call["method"]]
        return type("Done", (), {"returncode": 0, "stdout": json.dumps(dict.fromkeys(names, scores)).encode()})()

    monkeypatch.setattr(biology.subprocess, "run", run)
    command = ["--out", str(tmp_path), "--seeds", "0", "1"]
    assert biology.main(command) == 0
    page = capsys.readouterr().out
    assert page.count("0.500 ± 0.000") == len(biology.METHOD_NAMES) * (len(biology.SCORES) - 1)
    assert "7 cells, 2 labels" in page
    assert len(made) == 2 * len(biology.METHODS)
    assert (tmp_path / "biology.png").exists()
    assert biology.main(command) == 0
    assert len(made) == 2 * len(biology.METHODS)
    with pytest.raises(SystemExit):
        biology.main(["--out", str(tmp_path), "--data", "nothing.h5ad"])
