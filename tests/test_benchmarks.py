"""The command that scores methods on held-out data: runs, results file, tables and figures."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spaformer_sc import metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")

OWN_METHOD = """
import numpy as np


def ones(adata):
    assert set(adata.uns["task"]) >= {"protocol", "output", "target_sum", "random_state", "scratch"}
    return np.ones(adata.shape, np.float32), "rate"


def fails(adata):
    raise RuntimeError("no")


def lacks(adata):
    raise ImportError("the method 'lacks' needs the package lacks: pip install 'spaformer_sc[benchmark]'")


def reuses(adata):
    adata.uns["task"]["seconds_before"] = 1000.0
    return ones(adata)


def broken(adata):
    raise ImportError("something else")
"""


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy

    return accuracy


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tasks

    return tasks


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Two kinds of cells in two fields of view, as a file."""
    rng = np.random.default_rng(0)
    coords = rng.random((200, 2)) * 100
    programs = rng.gamma(0.5, size=(2, 20)) + 0.02
    rates = (programs / programs.sum(axis=1, keepdims=True))[(coords[:, 0] // 50).astype(int)]
    counts = sparse.csr_matrix(rng.poisson(rates * 60).astype(np.float32))
    obs = pd.DataFrame(
        {"fov": pd.Categorical(np.where(coords[:, 1] < 50, "low", "high"))}, index=[f"c{i}" for i in range(200)]
    )
    path = tmp_path / "stripes.h5ad"
    ad.AnnData(counts, obs=obs, obsm={"spatial": coords}).write_h5ad(path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN_METHOD)
    return str(path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(accuracy: ModuleType, method: str, seed: int, protocol: str = "thinning", **values: object) -> dict[str, str]:
    """A row of a results file, made up."""
    given = {"data": "set", "protocol": protocol, "method": method, "seed": seed, "threads": 1, "split": f"s{seed}"}
    given |= {"n_cells": 10, "n_genes": 5, "n_fovs": 2, "seconds": 1, "cpu_seconds": 2, "peak_mib": 3}
    return dict.fromkeys(accuracy.COLUMNS, "") | {name: str(value) for name, value in (given | values).items()}


def test_command(
    accuracy: ModuleType, stripes: Path, own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--data", str(stripes), "--protocols", "thinning", "--out", str(out), "--jobs", "2"]
    methods = ["gene_mean", f"{own}:fails", "truth"]  # the truth is not known of this set
    assert accuracy.main([*command, "--seeds", "0", "--methods", *methods]) == 1
    printed = capfd.readouterr()
    assert "stripes thinning 0 own.py:fails: failed" in printed.err
    (first,) = read(out / "runs.csv")
    facts = [first[name] for name in ("data", "method", "seed", "n_cells", "n_genes", "n_fovs")]
    assert facts == ["stripes", "gene_mean", "0", "200", "20", "2"]
    assert float(first["gain"]) == pytest.approx(0, abs=1e-6)
    assert float(first["gain_calibrated"]) > 0.05
    assert float(first["peak_mib"]) > 20
    assert first["rmse"] == ""
    pictures = ["thinning.png", "thinning_cost.png"]
    assert sorted(path.name for path in out.iterdir()) == ["runs.csv", "tables.md", *pictures]

    assert accuracy.main([*command, "--seeds", "0", "1", "--methods", "gene_mean"]) == 0
    again, second = read(out / "runs.csv")
    assert again == first
    assert (second["method"], second["seed"]) == ("gene_mean", "1")
    assert second["split"] != first["split"]
    capfd.readouterr()
    assert accuracy.main([*command, "--tables-only"]) == 0
    printed = capfd.readouterr()
    assert "done" not in printed.err
    assert "| gene_mean | 2 | 0.0000 ± 0.0000 |" in printed.out
    assert printed.out.strip() == (out / "tables.md").read_text().strip()


def test_own_methods_and_the_ceiling(tasks: ModuleType, stripes: Path, own: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "split")
    tasks.make_task(str(stripes), "fov", "thinning", 0, folder)
    ones, mean = (tasks.run_method(method, folder) for method in (f"{own}:ones", "gene_mean"))
    assert ones["gain"] < -0.1
    assert ones["gain_calibrated"] == pytest.approx(mean["gain_calibrated"], abs=1e-3)
    reused = tasks.run_method(f"{own}:reuses", folder)
    assert min(reused["seconds"], reused["cpu_seconds"]) >= 1000
    ceiling = tasks.run_method("ceiling", folder)
    assert set(ceiling) == {"gene_pearson"}
    assert 0.1 < ceiling["gene_pearson"] <= 1
    assert "spaformer_sc[benchmark]" in tasks.run_method(f"{own}:lacks", folder)["not_installed"]
    with pytest.raises(ImportError, match="something else"):
        tasks.run_method(f"{own}:broken", folder)


def test_methods_that_are_not_installed_are_no_failures(
    accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([{"split": "s"}, {"not_installed": "needs the extra"}, {"split": "t"}])
    monkeypatch.setattr(accuracy, "in_process", lambda job, threads: next(answers))
    place = {"name": "set", "library_key": "fov", "protocol": "thinning", "folder": str(tmp_path)}
    runner = accuracy.Runner(tmp_path / "runs.csv", [], 1, 2)
    runner.run_all([accuracy.Task(place | {"seed": seed}, ["magic"], tmp_path / "none", 1) for seed in (0, 1)], 1)
    assert (runner.failed, runner.rows) == (0, [])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[1/2] set thinning 0 magic: not installed: needs the extra",
        "[2/2] set thinning 1 magic: not installed",
    ]


@pytest.mark.parametrize("protocol", ["thinning", "entries", "blocks"])
@pytest.mark.parametrize("with_fovs", [True, False])
def test_tasks_are_what_methods_are_promised(
    tasks: ModuleType, stripes: Path, tmp_path: Path, protocol: str, with_fovs: bool
) -> None:
    folder = tmp_path / "split"
    facts = tasks.make_task(str(stripes), "fov" if with_fovs else "slide", protocol, 5, str(folder))
    assert (facts["n_cells"], facts["n_genes"], facts["n_fovs"]) == (200, 20, 2 if with_fovs else 0)
    given = ad.read_h5ad(folder / "task.h5ad")
    adata = ad.read_h5ad(stripes)
    labels = adata.obs["fov"].to_numpy() if with_fovs else metrics.quarters(adata.obsm["spatial"])
    split = metrics.make_split(adata.X, protocol, labels, random_state=5)
    assert (split.train != given.X).nnz == 0
    assert given.X.dtype == np.float32
    np.testing.assert_array_equal(given.obsm["spatial"], adata.obsm["spatial"])
    assert ("fov" in given.obs) == (with_fovs or protocol == "blocks")
    assert ("missing" in given.layers) == (protocol != "thinning")
    if protocol != "thinning":
        np.testing.assert_array_equal(given.layers["missing"], split.missing)
        assert not given.X.toarray()[split.missing].any()
    held = tasks.read_split(folder, protocol)
    assert (held.test != split.test).nnz == 0
    assert (held.validation != split.validation).nnz == 0
    result = tasks.run_method("gene_mean", str(folder))
    assert abs(result["gain" if protocol == "thinning" else "gene_pearson"]) < 1e-6


@pytest.mark.parametrize("protocol", ["thinning", "entries"])
def test_nothing_beats_the_truth(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    small = tasks.simulated_tissue(n_fovs=2, n_cells=300, n_genes=60)
    monkeypatch.setattr(tasks, "simulated_tissue", lambda random_state: small)
    folder = str(tmp_path / "split")
    tasks.make_task("simulated", "fov", protocol, 0, folder)
    truth, mean = (tasks.run_method(method, folder) for method in ("truth", "gene_mean"))
    if protocol == "thinning":
        assert truth["gain"] > mean["gain_calibrated"] + 0.1
        assert truth["gain_calibrated"] == pytest.approx(truth["gain"], abs=0.005)
    else:
        assert truth["rmse"] < 0.95 * mean["rmse_calibrated"]
        assert truth["rmse_calibrated"] == pytest.approx(truth["rmse"], rel=0.01)


def test_ours_are_run_as_their_names_say(tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spaformer_sc as sf

    calls: list[dict[str, object]] = []

    def impute(adata: ad.AnnData, **choices: object) -> ad.AnnData:
        calls.append(choices)
        result = adata.copy()
        result.layers["spaformer"] = np.ones(adata.shape, np.float32)
        return result

    monkeypatch.setattr(sf.tl, "impute", impute)
    names = {"spaformer": {}, "spaformer_fast": {"quality": "fast"}, "spaformer_best": {"quality": "best"}}
    names |= {"spaformer_paper": {"preset": "paper"}, "spaformer_no_attention": {"encoder": "mlp"}}
    adata = ad.AnnData(np.ones((4, 3), np.float32), layers={"missing": np.zeros((4, 3), bool)})
    adata.uns["task"] = {"output": "lognorm", "target_sum": 250.0, "random_state": 3}
    shared = {"library_key": None, "missing": "missing", "output": "lognorm", "target_sum": 250.0}
    shared |= {"random_state": 3, "progress": False, "copy": True}
    for name, own in names.items():
        prediction, scale = tasks.load_method(name)(adata)
        assert calls[-1] == shared | own
        assert (prediction.shape, scale) == ((4, 3), "lognorm")
    del adata.layers["missing"]
    adata.obs["fov"] = pd.Categorical(["a", "a", "b", "b"])
    tasks.load_method("spaformer")(adata)
    assert (calls[-1]["library_key"], calls[-1]["missing"]) == ("fov", None)


def test_code_versions_follow_what_a_method_is_made_of(accuracy: ModuleType, own: str) -> None:
    versions = {method: accuracy.code_version(method) for method in ("gene_mean", "spaformer", "blend", "truth")}
    assert len(set(versions.values())) == 4
    assert accuracy.code_version("spaformer_fast") == versions["spaformer"]
    before = accuracy.code_version(f"{own}:ones")
    Path(own).write_text("changed")
    assert accuracy.code_version(f"{own}:ones") != before


def test_imports_of_peers_are_followed(accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peers").mkdir()
    texts = {"a": "from ._b import x\n", "_b": "def f():\n    from . import c\n", "c": "from peers.d import y\n"}
    for name, text in {**texts, "d": "import numpy\n", "e": ""}.items():
        (tmp_path / "peers" / f"{name}.py").write_text(text)
    monkeypatch.setattr(accuracy, "HERE", tmp_path)
    assert {path.stem for path in accuracy.sources(tmp_path / "peers" / "a.py")} == {"a", "_b", "c", "d"}


def test_blend_waits_for_the_methods_before_it(
    accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    ended: list[str] = []
    slow = threading.Event()

    def in_process(job: dict[str, str], threads: int) -> dict[str, object]:
        if job["function"] == "make_task":
            Path(job["folder"]).mkdir()
            return {"split": "s"}
        if job["method"] == "gene_mean":
            slow.wait(10)
        if job["method"] == "ridge":
            slow.set()
        ended.append(job["method"])
        return {"gain": 0.0}

    monkeypatch.setattr(accuracy, "in_process", in_process)
    place = {"name": "set", "library_key": "fov", "protocol": "thinning", "seed": 0, "folder": str(tmp_path / "split")}
    methods = ["gene_mean", "ridge", "blend", "alra"]
    runner = accuracy.Runner(tmp_path / "runs.csv", [], 1, 4)
    runner.run_all([accuracy.Task(place, methods, tmp_path / "split", 4)], 2)
    assert set(ended) == set(methods)
    assert ended.index("blend") > ended.index("gene_mean")
    assert not (tmp_path / "split").exists()
    assert len(read(tmp_path / "runs.csv")) == 4


def test_lead_is_over_the_best_peer_of_each_score(accuracy: ModuleType) -> None:
    rows = []
    for seed, shift in enumerate((0.0, 0.1)):
        for method, gain, gene in (
            ("spaformer", 0.44, 0.20),
            ("spaformer_best", 0.9, 0.9),  # ours, and no peer
            ("spaformer_paper", 0.40, 0.1),
            ("magic", 0.2, 0.25),
            ("truth", 1.0, 1.0),
        ):
            scores = {"gain": gain + shift * (method != "magic"), "gene_pearson": gene}
            rows.append(row(accuracy, method, seed, **scores, gain_calibrated=gain, gene_pearson_calibrated=gene))
    results = accuracy.Results(rows)
    peer, leads = accuracy.lead(results, "set", "thinning", "gain", relative=True)
    assert peer == "spaformer_paper"
    assert leads == pytest.approx([10, 8])
    peer, leads = accuracy.lead(results, "set", "thinning", "gene_pearson", relative=False)
    assert peer == "magic"
    assert leads == pytest.approx([-0.05, -0.05])
    table = "\n".join(accuracy.lead_table(results, "thinning"))
    assert "| set | raw | spaformer_paper | +9.0 ± 1.4 |  | magic | -0.0500 ± 0.0000 |" in table
    summary = "\n".join(accuracy.summary_table(results, "thinning", ""))
    assert "| spaformer_best | **0.9500 ± 0.0707** |" in summary
    assert summary.index("| truth |") < summary.index("| spaformer_best |") < summary.index("| magic |")


def test_lead_beyond_a_gene_mean_that_was_treated_alike(accuracy: ModuleType) -> None:
    rows = [
        row(accuracy, "gene_mean", 0, gain=0.0, gain_calibrated=0.3),
        row(accuracy, "spaformer", 0, gain=0.44, gain_calibrated=0.45),
        row(accuracy, "blend", 0, gain=0.4, gain_calibrated=0.42),
    ]
    table = "\n".join(accuracy.lead_table(accuracy.Results(rows), "thinning"))
    assert "| set | raw | blend | +10.0 | +10.0 |" in table
    assert "| set | calibrated | blend | +7.1 | +25.0 |" in table


def test_gains_in_rmse_are_over_the_gene_mean(accuracy: ModuleType) -> None:
    rows = [
        row(accuracy, "gene_mean", 0, "entries", rmse=0.4, rmse_calibrated=0.5),
        row(accuracy, "spaformer", 0, "entries", rmse=0.3, rmse_calibrated=0.25, pearson="nan"),
        row(accuracy, "alra", 0, "entries", rmse=0.36, rmse_calibrated=0.45),
    ]
    results = accuracy.Results(rows)
    assert results.values("set", "entries", "spaformer", "rmse_gain") == pytest.approx([25])
    assert results.values("set", "entries", "spaformer", "rmse_gain_calibrated") == pytest.approx([50])
    assert results.values("set", "entries", "spaformer", "pearson") == []
    assert results.methods("entries") == ["spaformer", "alra", "gene_mean"]
    _, (lead,) = accuracy.lead(results, "set", "entries", "rmse_gain", relative=True)
    assert lead == pytest.approx(150)


def test_later_runs_stand_for_earlier_ones_of_the_same(accuracy: ModuleType) -> None:
    rows = [row(accuracy, "magic", 0, gain=0.1, code="a"), row(accuracy, "magic", 0, gain=0.2, code="b")]
    assert accuracy.Results(rows).values("set", "thinning", "magic", "gain") == [0.2]


def test_figures_of_all_protocols(accuracy: ModuleType, tmp_path: Path) -> None:
    rows = []
    for protocol in accuracy.PROTOCOLS:
        for data in ("one", "two"):
            methods = (("gene_mean", 0.0), ("spaformer", 0.2), ("magic", -0.5), ("truth", 0.3))
            for method, quality in methods if data == "one" else methods[:1]:
                scores = {"gain": quality} if protocol == "thinning" else {"rmse": 1 - quality}
                scores |= {f"{name}_calibrated": value for name, value in scores.items()}
                rows.append(row(accuracy, method, 0, protocol, **scores) | {"data": data})
    accuracy.report(rows, tmp_path)
    names = {f"{protocol}{kind}.png" for protocol in accuracy.PROTOCOLS for kind in ("", "_cost")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"tables.md"}


def test_refuses_what_it_cannot_do(
    accuracy: ModuleType, tmp_path: Path, stripes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    for given, message in (
        (["--data", str(tmp_path / "none.h5ad")], "there is no file"),
        (["--methods", "gene_means"], "neither path/to/file.py:function"),
        (["--methods", "nothing.py:impute"], "neither path/to/file.py:function"),
    ):
        with pytest.raises(SystemExit):
            accuracy.main([*given, *out])
        assert message in capsys.readouterr().err
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "stripes.h5ad").touch()
    with pytest.raises(SystemExit):
        accuracy.main(["--data", str(stripes), str(tmp_path / "more" / "stripes.h5ad"), *out])
    assert "the same name" in capsys.readouterr().err
    assert accuracy.main([*out, "--tables-only"]) == 1
    assert "no runs" in capsys.readouterr().err
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="not a results file"):
        accuracy.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="different splits"):
        accuracy.Results([row(accuracy, "magic", 0, split="a"), row(accuracy, "alra", 0, split="b")])


def test_runs_fail_where_their_split_does(
    accuracy: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.h5ad").write_text("nothing")
    command = ["--data", str(tmp_path / "broken.h5ad"), "--out", str(tmp_path / "out"), "--seeds", "0"]
    assert accuracy.main([*command, "--protocols", "entries", "--methods", "gene_mean", "ridge"]) == 1
    printed = capfd.readouterr().err
    assert "[1/2] broken entries 0 gene_mean: failed" in printed
    assert "[2/2] broken entries 0 ridge: failed" in printed
    assert not list((tmp_path / "out").iterdir())
