"""The command that measures growth, memory and speed: its tables, its simulated file, runs that are resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest

import spaformer_sc as sf

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import gpu  # noqa: E402
import scale  # noqa: E402


def row(part, cells, fovs, score, value, data="simulated"):
    key = part, data, str(cells or ""), "300", str(fovs or ""), "1", "0"
    return dict(zip(scale.KEY, key, strict=True)) | {"code": "c", "score": score, "value": str(value)}


def test_exponents_are_those_of_a_power_law() -> None:
    rows = []
    for cells in (1_000, 3_000, 10_000, 30_000, 100_000):
        for power, stage in zip((1.0, 1.1, 2.0, 1.0), scale.STAGES, strict=True):
            rows.append(row("growth", cells, 1, stage, 1e-6 * cells**power))
    page = scale.report(rows)
    assert "| exponent of the time | 1.00 | 1.10 | 2.00 | 1.00 |" in page
    assert "| exponent of the time, from 10000 cells | 1.00 | 1.10 | 2.00 | 1.00 |" in page
    assert "| 1000 | 1.0 |" in page
    assert "fields of view of 200 cells" not in page


def test_the_newer_of_two_runs_counts() -> None:
    rows = [row("step", 0, 0, "step, ms", value, "lung") for value in (5.0, 7.0)]
    page = scale.report(rows)
    assert "**Step**: lung, 300 genes, 1 thread(s), seed 0" in page
    assert "| step, ms | 7 |" in page


def test_slides_in_one_file_have_the_same_genes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scale, "SLIDE_FOVS", 2)
    monkeypatch.setattr(scale, "FOV_CELLS", 30)
    scale.simulate(tmp_path / "tissue.h5ad", 120, 12, 0)
    found = ad.read_h5ad(tmp_path / "tissue.h5ad")
    assert found.shape == (120, 12)
    assert found.obs["slide"].value_counts().to_dict() == {"0": 60, "1": 60}
    assert found.obs.groupby(["slide", "fov"], observed=True).size().tolist() == [30] * 4
    assert found.obsm["spatial"].shape == (120, 2)
    first, second = (found.X[part].toarray() for part in (slice(0, 60), slice(60, 120)))
    assert (first != second).any()
    ratio = (first.sum(axis=0) + 5) / (second.sum(axis=0) + 5)
    assert ratio.max() < 3


def test_runs_are_made_once(tmp_path) -> None:
    command = [sys.executable, str(FOLDER / "scale.py"), "--parts", "tissue", "--cells", "120", "--genes", "12"]
    command += ["--quality", "fast", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "[1/1] tissue simulated, fast 120 12 1 0: done" in first.stdout
    assert "| cells written | 120 |" in first.stdout
    assert "| finite | 1 |" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "done" not in second.stdout
    assert "| cells written | 120 |" in second.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.csv", "tables.md"]


def test_stages_of_growth_are_measured() -> None:
    found = scale.growth(cells=400, genes=20, fovs=2, seed=0)
    assert set(found) == set(scale.STAGES)
    assert min(found.values()) > 0


@pytest.fixture(scope="module")
def tissue(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scale") / "tissue.h5ad"
    sf.datasets.simulated_tissue(5, 30, 15).write_h5ad(path)
    return str(path)


def test_what_methods_take_is_one_table_for_each_data_set() -> None:
    takes = {"ours, fast": 5.0, "MAGIC, tuned": 70.0}
    rows = [row("race", 0, 0, cost, s, f"lung, {name}") for name, s in takes.items() for cost in scale.COSTS]
    rows.append(row("race", 0, 0, "scVI, gain", 0.4, "lung"))
    page = scale.report(rows)
    assert page.count("**Race**") == 2
    assert "| ours, fast | 5 | 5 | 5 | 5 |\n| MAGIC, tuned | 70 | 70 | 70 | 70 |" in page
    assert "| scVI, gain | 0.4 |" in page


def test_every_method_has_a_process_of_its_own(tissue) -> None:
    class Arguments:
        parts, data, library_key, seeds, threads = ("race",), [tissue], "fov", [3], 1

    runs = scale.planned(Arguments)
    assert len({key for key, _ in runs}) == len(runs)
    assert [job.get("method") for _, job in runs] == [None, *scale.RACERS]
    assert all(job["seed"] == 3 for _, job in runs)


def test_what_a_method_takes_is_measured(tissue, monkeypatch) -> None:
    def gene_mean(task):
        assert task.obs["fov"].nunique() == 5
        return np.tile(np.asarray(task.X.mean(axis=0)), (task.n_obs, 1))

    monkeypatch.setattr(scale, "racer", lambda method: gene_mean)
    found = scale.whole("ours, fast", tissue, "fov", 0)
    assert tuple(found) == scale.COSTS
    assert found["gain"] == pytest.approx(0, abs=1e-6)
    assert found["s"] > 0
    assert found["peak, MiB"] > 0


def test_magic_runs_as_it_comes_and_tuned(tissue) -> None:
    pytest.importorskip("magic")
    task, _ = scale.half(tissue, "fov", 0)
    plain, tuned = (scale.racer(name)(task) for name in ("MAGIC", "MAGIC, tuned"))
    for rates in (plain, tuned):
        np.testing.assert_allclose(rates.sum(axis=1), 1, rtol=1e-5)
    assert (plain != tuned).any()


def test_the_race_ends_where_the_score_of_scvi_is_passed(tissue, monkeypatch) -> None:
    import peers.scvi

    from spaformer_sc.training import trainer

    class Rival:
        def train(self) -> None:
            """As long as a clock of the test says."""

    class Short(sf.SpaFormer):
        def __init__(self, **choices) -> None:
            super().__init__(**{"max_epochs": 4} | choices)

    def impute(task):
        package.model.SCVI().train()
        held = ad.read_h5ad(tissue).X - task.X
        return np.ones(task.shape) if easy else held.toarray() + 1e-9, "rate"

    package = SimpleNamespace(model=SimpleNamespace(SCVI=Rival))
    monkeypatch.setitem(sys.modules, "scvi", package)
    monkeypatch.setattr(peers.scvi, "scvi", impute)
    monkeypatch.setattr(sf, "SpaFormer", Short)
    validated = trainer._Watch.check
    for easy in (True, False):  # all genes alike; what was held out itself
        monkeypatch.setattr(trainer._Watch, "check", validated)
        found = scale.race(tissue, "fov", 0)
        assert 0 <= found["scVI, training, s"] <= found["scVI, all, s"]
        assert found["ours, fast, all, s"] > 0
        assert ("ours, to that gain, s" in found) == easy
        assert (found["ours, best gain on the way"] >= found["scVI, gain"]) == easy
        if easy:
            assert found["scVI, gain"] < 0 < found["ours, steps to that gain"]
            assert found["ours, to that gain, s"] < found["ours, fast, all, s"]
            ratio = found["ours, to that gain, s"] / found["scVI, training, s"]
            assert found["ours over scVI, training"] == ratio


def test_transfer_scores_the_same_cells_each_time(tissue, monkeypatch) -> None:
    class Short(sf.SpaFormer):
        def __init__(self, **choices) -> None:
            super().__init__(**{"max_epochs": 2} | choices)

    monkeypatch.setattr(sf, "SpaFormer", Short)
    monkeypatch.setattr(scale, "EFFORTS", (0.5,))
    seen = []
    impute = Short.impute
    monkeypatch.setattr(Short, "impute", lambda self, adata, **to: seen.append(adata) or impute(self, adata, **to))
    found = scale.transfer(tissue, "fov", 0)
    assert found["cells of the few"] + found["cells of the others"] == 150
    assert found["cells of the few"] == 60
    assert len(seen) == 3
    assert all(adata is seen[0] for adata in seen)
    titles = ("fitted to the few, as it is", "tuned with at most 50 % of the steps", "fitted anew")
    assert list(found)[2:] == [f"{title}, {what}" for title in titles for what in ("CPU s", "steps", "gain")]
    assert found[f"{titles[1]}, steps"] < found[f"{titles[2]}, steps"]
    with pytest.raises(SystemExit, match="needs fields of view"):
        scale.transfer(tissue, "slide", 0)


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu")]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "gpu").exists()


def test_what_is_measured_on_a_gpu_runs_on_a_processor(tmp_path, monkeypatch, capsys) -> None:
    compiled = []
    monkeypatch.setattr(gpu.torch, "compile", lambda network: compiled.append(network) or network)
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    command = ["--device", "cpu", "--cells", "220", "--genes", "12", "--repeats", "1", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    rows = gpu.read_rows(tmp_path / "runs.csv", gpu.COLUMNS)
    assert [sum(row["part"] == part for row in rows) for part in gpu.PARTS] == [8, 4, 4, 1]
    assert len(compiled) == 4
    assert all(float(row["ms"]) > 0 for row in rows)
    assert "| exact, bf16, fields of view of 200 | 200 | 12 |" in capsys.readouterr().out
    assert gpu.main([*command, "--parts", "attention", "transfer"]) == 0
    assert gpu.read_rows(tmp_path / "runs.csv", gpu.COLUMNS) == rows


def test_pieces_of_a_batch_are_moved_and_the_rest_kept() -> None:
    from spaformer_sc.nn.network import Tokens

    one = gpu.torch.ones(2, 3)
    tokens = gpu.mapped(Tokens((one, one), one, one[:, 0], None, [2]), lambda tensor: tensor + 1)
    assert tokens.lengths == [2]
    assert tokens.visible is None
    assert all((part == 2).all() for part in (*tokens.values, tokens.counts, tokens.depth))
