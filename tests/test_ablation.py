"""The ablation command: variants that can be built, paired differences with a known answer, runs that are resumed."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

import spaformer_sc as sf

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    return ablation


def rows(ablation: ModuleType, values: dict[tuple[str, str, int], float], **columns: str) -> list[dict[str, str]]:
    """Rows of results: (variant, data, seed) to gain."""
    other = dict.fromkeys(ablation.COLUMNS, "1") | {"protocol": "thinning", "size": "small", "library_key": "fov"}
    return [
        other
        | columns
        | {
            "settings": ablation.fingerprint(variant, "small"),
            "variant": variant,
            "data": data,
            "seed": str(seed),
            "gain": str(gain),
            "validation": str(gain),
        }
        for (variant, data, seed), gain in values.items()
    ]


def test_every_variant_is_a_model_and_answers_a_question(ablation: ModuleType) -> None:
    for variant in ablation.VARIANTS.values():
        for size in ablation.SIZES.values():
            sf.SpaFormer(settings={**size.settings, **variant.settings}, **variant.choices)
    asked = {name for q in ablation.QUESTIONS.values() for name in (*q.variants, q.reference)}
    assert asked == set(ablation.VARIANTS)


def test_differences_are_paired_by_data_and_seed(ablation: ModuleType) -> None:
    # Seeds differ much more than variants; the unpaired third seed of "a" must not count.
    gains = {("default", "a", 0): 1.0, ("default", "a", 1): 2.0, ("mlp", "a", 0): 1.02, ("mlp", "a", 1): 2.08,
             ("default", "b", 0): 4.0, ("default", "b", 1): 8.0, ("mlp", "b", 0): 4.0, ("mlp", "b", 1): 8.16,
             ("default", "a", 2): 9.0}  # fmt: skip
    found = ablation.change(rows(ablation, gains), "thinning", "mlp", "default", "gain")
    assert found.by_data["a"] == pytest.approx((3.0, np.std([2, 4], ddof=1)))
    assert found.by_data["b"] == pytest.approx((1.0, np.std([0, 2], ddof=1)))
    assert found.mean == pytest.approx(2.0)
    error = math.sqrt(2 / 2 + 2 / 2) / 2
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert found.verdict == "no difference"
    unit = ablation.change(rows(ablation, gains), "thinning", "mlp", "default", "gain", percent=False)
    assert unit.by_data["a"][0] == pytest.approx((0.02 + 0.08) / 2)


def test_a_noisy_data_set_widens_the_interval(ablation: ModuleType) -> None:
    # One set has all the spread, so that the interval rests on its three seeds alone: two degrees of freedom.
    gains = {("default", data, seed): 1.0 for data in "abcde" for seed in (0, 1, 2)}
    gains |= {("mlp", data, seed): 1.01 for data in "abcd" for seed in (0, 1, 2)}
    gains |= {("mlp", "e", seed): 1.01 + 0.02 * (seed - 1) for seed in (0, 1, 2)}
    found = ablation.change(rows(ablation, gains), "thinning", "mlp", "default", "gain")
    assert found.mean == pytest.approx(1.0)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(2**2 / 3) / 5, rel=1e-6)


@pytest.mark.parametrize(("changes", "verdict"), [((1.0, 1.1), "better"), ((-1.0, -1.1), "worse"), ((-1.0, 1.0), "no difference")])  # fmt: skip # noqa: E501
def test_the_verdict_is_what_the_interval_says(
    ablation: ModuleType, changes: tuple[float, float], verdict: str
) -> None:
    gains = {("default", data, seed): 1.0 for data in "ab" for seed in (0, 1)}
    gains |= {("mlp", data, seed): 1 + changes[seed] / 100 for data in "ab" for seed in (0, 1)}
    assert ablation.change(rows(ablation, gains), "thinning", "mlp", "default", "gain").verdict == verdict


def test_a_smaller_error_is_better(ablation: ModuleType) -> None:
    made = rows(ablation, {("default", "a", 0): 1.0, ("mlp", "a", 0): 1.0}, protocol="entries")
    made[0]["rmse"], made[1]["rmse"] = "0.50", "0.45"
    found = ablation.change(made, "entries", "mlp", "default", "rmse")
    assert found.mean == pytest.approx(10.0)
    assert found.verdict == "too few seeds"


def test_variants_on_different_splits_are_not_compared(ablation: ModuleType, tmp_path: Path) -> None:
    made = rows(ablation, {("default", "a", 0): 1.0, ("mlp", "a", 0): 1.0})
    made[1]["split"] = "other"
    with pytest.raises(SystemExit, match="different splits"):
        ablation.report(made, tmp_path)


@pytest.mark.parametrize("protocol", ["thinning", "entries", "blocks"])
def test_a_group_scores_variants_on_one_split(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    settings = {"n_steps": 12, "n_validations": 2, "tokens_per_step": 64, "dim": 16, "warmup_steps": 2}
    monkeypatch.setitem(ablation.SIZES, "small", ablation.Size(200, 40, settings))
    first, same = ablation.run_group("simulated", "fov", "small", protocol, 0, ["mlp", "mlp"])
    other, again = ablation.run_group("simulated", "fov", "small", protocol, 0, ["latent_20", "mlp"])
    assert same == first
    # A run that is added later saw the same split, and the same variant gives the same result.
    assert other["split"] == first["split"]
    drop = {"cpu_seconds"}
    assert {k: v for k, v in again.items() if k not in drop} == pytest.approx(
        {k: v for k, v in first.items() if k not in drop}, nan_ok=True
    )
    assert (first["n_cells"], first["n_genes"]) == (200, 40)
    used, unused = ("gain", "rmse") if protocol == "thinning" else ("rmse", "gain")
    assert math.isfinite(first[used])
    assert math.isnan(first[unused])
    assert first["gene_pearson"] != other["gene_pearson"]


def test_middle_cells_of_every_field_of_view_are_kept(ablation: ModuleType) -> None:
    whole = sf.datasets.simulated_tissue(random_state=0)
    part = ablation.load("simulated", "fov", ablation.Size(400, 50, {}))
    fractions = part.obs["fov"].value_counts() / whole.obs["fov"].value_counts()
    assert fractions.to_numpy() == pytest.approx(400 / whole.n_obs, rel=0.01)
    totals = np.asarray(whole.X.sum(axis=0)).ravel()
    assert set(part.var_names) == set(whole.var_names[np.argsort(-totals)[:50]])
    for fov in part.obs["fov"].unique():
        all_of_it = whole.obsm["spatial"][(whole.obs["fov"].astype(str) == fov).to_numpy()]
        kept = part.obsm["spatial"][(part.obs["fov"] == fov).to_numpy()]
        distance = np.abs(all_of_it - np.median(all_of_it, axis=0)).max(axis=1)
        inside = np.abs(kept - np.median(all_of_it, axis=0)).max(axis=1)
        assert inside.max() <= np.sort(distance)[len(kept) - 1] + 1e-9


def test_the_command_writes_tables_and_skips_what_it_has(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict] = []

    def run_groups(groups, jobs, out, done, names):
        calls.extend(groups)
        for group in groups:
            for i, variant in enumerate(group["variants"]):
                values = {(variant, names[group["data"]], group["seed"]): 1 + 0.01 * i + 0.001 * group["seed"]}
                done += rows(ablation, values)
        ablation.write_rows(out, ablation.COLUMNS, done)
        return 0

    monkeypatch.setattr(ablation, "run_groups", run_groups)
    command = ["--out", str(tmp_path), "--seeds", "0", "1", "--variants"]
    assert ablation.main([*command, "mlp"]) == 0
    assert [group["variants"] for group in calls] == [["default", "mlp"]] * 2
    calls.clear()
    assert ablation.main([*command, "mlp", "exact"]) == 0
    assert [group["variants"] for group in calls] == [["exact"]] * 2
    assert "no attention" in capsys.readouterr().out
    with (tmp_path / "small" / "space_thinning.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == ["default (nats)", "no attention", "exact attention"]
    assert table[1]["verdict"] == "better"
    assert (tmp_path / "small" / "space.png").stat().st_size > 5000
    assert "space.png" in (tmp_path / "small" / "tables.md").read_text()


def test_runs_of_another_default_are_not_taken_for_this_one(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = rows(ablation, {("default", "simulated", 0): 1.0, ("mlp", "simulated", 0): 1.0})
    ablation.write_rows(tmp_path / "runs.csv", ablation.COLUMNS, [row | {"settings": "of old"} for row in old])
    calls: list[dict] = []
    monkeypatch.setattr(ablation, "run_groups", lambda groups, *_: calls.extend(groups) or 0)
    ablation.main(["--out", str(tmp_path), "--seeds", "0", "--variants", "mlp"])
    assert [group["variants"] for group in calls] == [["default", "mlp"]]


def test_cost_is_compared_within_a_run(ablation: ModuleType) -> None:
    made = rows(ablation, {(v, "a", s): 1.0 for v in ("default", "mlp") for s in (0, 1, 2)})
    for row in made:
        slow_machine = 1 + 5 * int(row["seed"])
        row["steps"], row["cpu_seconds"] = "10", str(slow_machine * (1.0 if row["variant"] == "default" else 0.5))
    assert ablation.costs(made) == [
        {"variant": "default", "cost": "1.00"}, {"variant": "no attention", "cost": "0.50"}
    ]  # fmt: skip


def test_a_run_that_fails_is_counted_and_the_others_are_kept(ablation: ModuleType, tmp_path: Path) -> None:
    group = {"data": "simulated", "library_key": "fov", "size": "small", "protocol": "thinning", "seed": 0,
             "variants": ["no such variant"]}  # fmt: skip
    done: list[dict[str, str]] = []
    assert ablation.run_groups([group], 1, tmp_path / "runs.csv", done, {"simulated": "simulated"}) == 1
    assert done == []
