"""The command that checks intervals, verdicts and zeros: known answers, tables, runs that are resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import spaformer_sc as sf

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import trust

    def small(data: str, library_key: str, seed: int):
        return sf.datasets.simulated_tissue(n_fovs=2, n_cells=200, n_genes=60, random_state=seed)

    def quickly(adata, library_key: str, quality: str, seed: int) -> None:
        sf.tl.impute(adata, library_key="fov", quality="fast", max_epochs=20, random_state=seed, progress=False)

    monkeypatch.setattr(trust, "load", small)
    monkeypatch.setattr(trust, "impute", quickly)
    return trust


def by_name(found: list[tuple[str, str, float]]) -> dict[tuple[str, str], float]:
    return {(score, of): value for score, of, value in found}


def test_halves_are_held_against_each_other(trust) -> None:
    found = by_name(trust.halves("simulated", "fov", "fast", 0))
    for level in trust.LEVELS:
        assert found[f"inside {level}", "all"] > level - 0.02
        assert found[f"randomised {level}", "all"] == pytest.approx(level, abs=0.02)
        for name in trust.STRATA:
            lowest, highest = (found[f"randomised {level}", f"{name}: {end}"] for end in trust.ENDS)
            assert lowest - 1e-9 <= found[f"randomised {level}", "all"] <= highest + 1e-9
    assert sum(found["genes", name] for name in trust.VERDICTS) <= 60
    bins = [of for score, of in found if score == "predicted"]
    assert len(bins) >= 3
    # Few zeros are likelier to have been a count, and so small a tissue leaves these badly known.
    assert all(found["predicted", of] == pytest.approx(found["seen", of], abs=0.1) for of in bins[:3])
    assert found["kept zeros", "counted in the other half"] < 0.05


def test_hidden_entries_are_held_against_their_intervals(trust) -> None:
    found = by_name(trust.missing("simulated", "fov", "fast", 0))
    for level in trust.LEVELS:
        assert found[f"inside {level}", "all"] > level - 0.03
        # Of so small a tissue little is held out to fit them to: over five seeds 0.02 to 0.06 too few.
        assert found[f"randomised {level}", "all"] == pytest.approx(level, abs=0.07)


def test_shuffled_genes_are_told_from_the_others(trust) -> None:
    found = by_name(trust.shuffled("simulated", "fov", "fast", 0))
    assert (found["genes", "shuffled"], found["genes", "as they were"]) == (15, 45)
    for name in ("shuffled", "as they were"):
        assert sum(found[verdict, name] for verdict in trust.VERDICTS) == pytest.approx(1)
    assert found["reliable", "shuffled"] <= 0.07


def test_wrong_intervals_would_be_seen(trust, monkeypatch: pytest.MonkeyPatch) -> None:
    from spaformer_sc.training.posterior import Posterior

    monkeypatch.setattr(Posterior, "shape", lambda self, mean, *_: np.full(np.shape(mean), 0.02))
    found = by_name(trust.halves("simulated", "fov", "fast", 0))
    assert abs(found["randomised 0.95", "all"] - 0.95) > 0.02


def test_tables_and_runs_that_are_there(trust, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    answers = {
        "halves": [(f"{kind} {level}", "all", level) for kind in trust.KINDS for level in trust.LEVELS]
        + [("predicted", "(0, 0.05]", 0.02), ("seen", "(0, 0.05]", 0.03), ("genes", "reliable", 12.0)],
        "missing": [("inside 0.8", "all", 0.91)],
        "shuffled": [("genes", "shuffled", 15.0), ("reliable", "shuffled", 0.02)],
        "tests": [("between cell types, no difference", method, 0.05) for method in trust.TESTED]
        + [("between cell types, no difference", "number", 300.0)],
    }

    def run(command, **_):
        made.append(command[-2])
        lines = json.dumps(answers[command[-2]]).encode()
        return type("Done", (), {"returncode": 0, "stdout": b"something else\n" + lines})()

    monkeypatch.setattr(trust.subprocess, "run", run)
    command = ["--out", str(tmp_path), "--seeds", "0", "1"]
    assert trust.main(command) == 0
    assert sorted(made) == sorted(2 * trust.PARTS)
    page = capsys.readouterr().out
    for text in (
        "91.0 ± 0.0",
        "| simulated | 80 | 80.0 ± 0.0 | 80.0 ± 0.0 |",
        "2.0 / 3.0",
        "12 ± 0",
        "| shuffled | 15 | 2.0 ± 0.0 |",
    ):
        assert text in page
    assert "| between cell types, no difference | 300 | 5.0 ± 0.0 |" in page
    assert (tmp_path / "trust.png").stat().st_size > 10_000
    assert trust.main(command) == 0
    assert len(made) == 2 * len(trust.PARTS)


def test_a_failed_run_is_told(trust, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(trust.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1, "stdout": b""})())
    assert trust.main(["--out", str(tmp_path), "--parts", "tests", "--seeds", "0"]) == 1
    assert "failed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        trust.main(["--out", str(tmp_path), "--data", "nothing.h5ad"])
