"""How time and memory grow: parts of a run over the number of cells, a tissue of a million cells, and the way to scVI.

    python benchmarks/scale.py --out scale
    python benchmarks/scale.py --parts race memory --data lung.h5ad --library-key fov --out scale --threads 1

Every run has a process of its own; runs that the results file holds, made by the same code, are skipped.
`benchmarks/README.md` says what is measured and how the tables are read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from runs import Row, checksum, package_files, peak_mib, pinned_environment, read_rows, write_rows

PARTS = ("growth", "step", "memory", "race", "transfer", "tissue")
RACERS = {"ours, fast": "spaformer_sc", "scVI": "scvi", "MAGIC": "magic", "MAGIC, tuned": "magic"}
COSTS = ("s", "CPU s", "peak, MiB", "gain")
MAGIC_DEFAULTS = (5, 100, "root", 3)
FEW = 4
EFFORTS = (0.1, 0.2, 0.4)
KEY = ("part", "data", "cells", "genes", "fovs", "threads", "seed")
COLUMNS = (*KEY, "code", "score", "value")
ONE_FOV = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
MANY_FOVS = (1, 3, 10, 30, 100, 300, 1_000)
CELLS_OF_A_FOV = 200
GROWTH_GENES = 300
MANY_CELLS = 10_000
STAGES = ("graph", "encodings", "training step", "prediction")
SLIDE_FOVS, FOV_CELLS = 10, 4_000
SMALL_STEPS = 100

Values = dict[str, float]


# -------------------------------------------------------------------------------------------------------------- growth


def positions(cells: int, fovs: int, seed: int) -> tuple[Any, Any]:
    """Cells at random in squares of equal density; and the FOV of each."""
    import numpy as np

    rng = np.random.default_rng(seed)
    side = 12.0 * (cells / fovs) ** 0.5
    return rng.uniform(0, side, (cells, 2)), np.arange(cells) * fovs // cells


def growth(cells: int, genes: int, fovs: int, seed: int) -> Values:
    """Time of each stage, in seconds: graphs and encodings of all cells, a training step, prediction of all cells."""
    import numpy as np
    import scipy.sparse as sp
    import torch
    from torch_geometric.data import Data

    import spaformer_sc as sf
    from spaformer_sc._threads import Workers
    from spaformer_sc.data._fields import GraphConfig, Layout, fields_of_view
    from spaformer_sc.positional import build_positional
    from spaformer_sc.training.trainer import _optimizer, batch_loss

    rng = np.random.default_rng(seed)
    coordinates, codes = positions(cells, fovs, seed)
    counts = sp.random(cells, genes, 0.12, "csr", np.float32, random_state=seed)
    counts.data[:] = 1 + rng.poisson(0.3, counts.nnz)
    names = [str(number) for number in range(fovs)]
    found: Values = {}

    def layout(part: slice) -> Layout:
        return Layout(
            coordinates[part], codes[part], names[: codes[part].max() + 1], GraphConfig(), None, 2, 4000, None
        )

    encode = build_positional(["laplacian"], 8, k=10).features

    def encoded(field: Any) -> Any:
        return encode(Data(edge_index=field.edge_index, num_nodes=field.n_cells))

    encoded(fields_of_view(layout(slice(0, 100)))[0][0])  # imports and compiles what it needs
    started = time.perf_counter()
    fields, _ = fields_of_view(layout(slice(None)))
    found["graph"] = time.perf_counter() - started
    started = time.perf_counter()
    for field in fields:
        encoded(field)
    found["encodings"] = time.perf_counter() - started

    # A fit to a few cells gives a network of the usual size; steps and prediction are then those of all cells.
    import anndata as ad

    few = ad.AnnData(counts[: min(cells, 600)], obsm={"spatial": coordinates[: min(cells, 600)]})
    model = sf.SpaFormer(quality="fast", max_epochs=1, progress=False).fit(few)
    sampler = model._sampler(torch.device("cpu"))
    from spaformer_sc.training.sequences import sequences

    data = sequences(fields, counts, None)
    network = model._networks[0].train()
    optimizer = _optimizer(network, model.settings.training)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    n_tokens = 0
    for batch in sampler.epoch(data, generator):
        optimizer.zero_grad()
        batch_loss(network, batch, 0.0, generator).backward()
        optimizer.step()
        n_tokens += len(batch.tokens.depth)
    found["training step"] = time.perf_counter() - started
    network.eval()
    model._concentration = 20.0  # counts of cells alike come in, whatever a few cells said of them
    started = time.perf_counter()
    with Workers(torch.device("cpu")) as workers:
        for sequence in data:
            inside = np.flatnonzero(sequence.fov.weight > 0)
            opened = sampler.open(sequence)
            model._predict_field(opened, inside, None, inside[:0], workers, "lognorm", 100.0, None, True)
    found["prediction"] = time.perf_counter() - started
    return found


# ---------------------------------------------------------------------------------------------------------------- step


def step(data: str, library_key: str, seed: int) -> Values:
    """Milliseconds of a training step and of its batch, and what its matrix products would take at the best rate."""
    import anndata as ad
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import spaformer_sc as sf
    from spaformer_sc.training import trainer
    from spaformer_sc.training.sequences import sequences

    adata = load(data, library_key)
    model = sf.SpaFormer(library_key=key_in(adata, library_key), quality="fast", max_epochs=1, progress=False)
    small = ad.AnnData(adata.X[:1000], obs=adata.obs[:1000], obsm={"spatial": adata.obsm["spatial"][:1000]})
    small.var_names = adata.var_names
    model.fit(small)
    loaded = model._take(model._open(adata, model.keys))
    fields = sequences(loaded.fields, loaded.counts, None)
    sampler = model._sampler(torch.device("cpu"))
    network = model._networks[0].train()
    optimizer = trainer._optimizer(network, model.settings.training)
    average = trainer.WeightAverage(network, 0.99)
    generator = torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {"batch": [], "step": [], "step in bf16": []}
    batch = None
    for number in range(7):
        half_precision = number > 0 and number % 2 == 0
        before = time.perf_counter()
        for n_batches, batch in enumerate(sampler.epoch(fields, generator), start=1):
            if n_batches == 1 and number == 0:
                with FlopCounterMode(display=False) as counter:
                    trainer.batch_loss(network, batch, 0.0, generator).backward()
                flops = counter.get_total_flops()
            now = time.perf_counter()
            if number:
                times["batch"].append(now - before)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
                loss = trainer.batch_loss(network, batch, 0.0, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update(network)
            before = time.perf_counter()
            if number:
                times["step in bf16" if half_precision else "step"].append(before - now)
    left, right = torch.rand(2048, 2048), torch.rand(2048, 2048)
    rates = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        rates.append(2 * 2048**3 / (time.perf_counter() - started))
    floor = flops / max(rates)
    # The first batches of an epoch take the corruption of many.
    spent = {"batch": float(np.mean(times["batch"])), "step": float(np.median(times["step"]))}
    return {
        "batch, ms": 1e3 * spent["batch"],
        "step, ms": 1e3 * spent["step"],
        "step in bf16, ms": 1e3 * float(np.median(times["step in bf16"])),
        "matrix products, GFLOP": flops / 1e9,
        "best rate, GFLOP/s": max(rates) / 1e9,
        "floor, ms": 1e3 * floor,
        "times the floor": sum(spent.values()) / floor,
    }


# -------------------------------------------------------------------------------------------------------------- memory


def load(data: str, library_key: str) -> Any:
    """Counts, positions and fields of view of a data set, in memory."""
    import anndata as ad
    import numpy as np
    from scipy import sparse

    given = ad.read_h5ad(data)
    obs = given.obs[[library_key]].astype(str).astype("category") if library_key in given.obs else given.obs[[]]
    counts = sparse.csr_matrix(given.X).astype(np.float32)
    return ad.AnnData(counts, obs=obs, var=given.var[[]], obsm={"spatial": np.asarray(given.obsm["spatial"])})


def key_in(adata: Any, library_key: str) -> str | None:
    """The column of fields of view, where there is one."""
    return library_key if library_key in adata.obs else None


def memory(data: str, library_key: str, seed: int) -> Values:
    """Peak memory of an imputation in memory over that of the packages, beside input and output; in MiB."""
    import spaformer_sc as sf

    sf.tl.impute(sf.datasets.simulated_tissue(2, 60, 20), library_key="fov", max_epochs=1, progress=False)
    packages = peak_mib()
    adata = load(data, library_key)
    sf.tl.impute(
        adata,
        library_key=key_in(adata, library_key),
        settings={"n_steps": SMALL_STEPS},
        random_state=seed,
        progress=False,
    )
    counts = adata.X
    given = (counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes) / 2**20
    taken = sum(part.nbytes for part in (adata.layers["spaformer"], adata.obsm["X_spaformer"])) / 2**20
    peak = peak_mib()
    return {
        "packages, MiB": packages,
        "peak, MiB": peak,
        "input and output, MiB": given + taken,
        "peak over input and output": (peak - packages) / (given + taken),
    }


# ---------------------------------------------------------------------------------------------------------------- race


def half(data: str, library_key: str, seed: int) -> tuple[Any, Any]:
    """Half of the transcripts of a data set, as the methods of the accuracy benchmark take them; and the split."""
    from spaformer_sc import metrics

    task = load(data, library_key)
    split = metrics.thin(task.X, 0.5, random_state=seed)
    task.X = split.train
    if key_in(task, library_key):
        task.obs["fov"] = task.obs[library_key]
    output = {"protocol": "thinning", "output": "rate", "target_sum": 1.0, "random_state": seed, "scratch": None}
    task.uns["task"] = output
    return task, split


def whole(method: str, data: str, library_key: str, seed: int) -> Values:
    """Time and peak memory of one method from half of the counts to rates of all cells, and its score on the rest."""
    from spaformer_sc import metrics

    importlib.import_module(RACERS[method])
    task, split = half(data, library_key, seed)
    impute = racer(method)
    started, used = time.perf_counter(), time.process_time()
    rates = impute(task)
    costs = time.perf_counter() - started, time.process_time() - used, peak_mib()
    return dict(zip(COSTS, (*costs, metrics.poisson_gain(split.held, rates, split.train)), strict=True))


def racer(method: str) -> Callable[[Any], Any]:
    """Give a method of :data:`RACERS` as a function from a task to rates."""
    import numpy as np
    from peers import load as peer
    from peers._cells import Cells
    from peers._tuning import as_shares

    def magic_as_it_comes(task: Any) -> Any:
        cells = Cells.of(task)
        every = np.arange(task.n_obs)
        ((_, rates),) = peer("magic").family(cells, [MAGIC_DEFAULTS], every, task.uns["task"]["random_state"])
        return as_shares(rates, cells.gene_mean)

    if method == "MAGIC":
        return magic_as_it_comes
    impute = peer({"ours, fast": "spaformer_fast", "scVI": "scvi", "MAGIC, tuned": "magic"}[method])
    return lambda task: impute(task)[0]


def race(data: str, library_key: str, seed: int) -> Values:
    """Time that scVI trains, its held-out score, and the time in which each quality of ours comes to that score.

    Half of the transcripts are held out. Every network of ours is scored whenever it is validated; the time of scoring
    is not counted.
    """
    import numpy as np
    import torch
    from peers.scvi import scvi

    import spaformer_sc as sf
    from spaformer_sc import metrics
    from spaformer_sc.training import trainer

    task, split = half(data, library_key, seed)
    found: Values = {}
    started = time.perf_counter()
    import scvi as package

    trained: list[float] = []
    original = package.model.SCVI.train

    def timed(self: Any, *positional: Any, **named: Any) -> Any:
        before = time.perf_counter()
        result = original(self, *positional, **named)
        trained.append(time.perf_counter() - before)
        return result

    package.model.SCVI.train = timed
    rates, _ = scvi(task)
    found["scVI, training, s"] = trained[0]
    found["scVI, all, s"] = time.perf_counter() - started
    found["scVI, gain"] = metrics.poisson_gain(split.held, rates, split.train)

    model = sf.SpaFormer(library_key=key_in(task, library_key), quality="fast", random_state=seed, progress=False)
    check, scoring = trainer._Watch.check, [0.0]
    started = time.perf_counter()

    def scored(self: Any, at: int, epoch: float) -> bool:
        finite: bool = check(self, at, epoch)
        before = time.perf_counter()
        share = np.zeros(task.shape, dtype=np.float32)
        sampler = model._sampler(torch.device("cpu"))
        with torch.inference_mode():
            for field in everything.fields:
                tokens = sampler.whole(opened.read(field))
                inside = field.weight > 0
                part = self.network.decoder.share(self.network(tokens).decoded).numpy()[inside]
                share[field.cells[inside]] += part * field.weight[inside][:, None]
        gain = metrics.poisson_gain(split.held, share, split.train)
        taken = before - started - scoring[0]
        scoring[0] += time.perf_counter() - before
        if gain >= found["scVI, gain"] and "ours, to that gain, s" not in found:
            found["ours, to that gain, s"] = taken
            found["ours, steps to that gain"] = at
        found["ours, best gain on the way"] = max(gain, found.get("ours, best gain on the way", gain))
        return finite

    opened = model._open(task, model.keys)
    everything = model._take(opened)
    started = time.perf_counter()
    trainer._Watch.check = scored
    model.fit(task)
    found["ours, fast, all, s"] = time.perf_counter() - started - scoring[0]
    found["ours, fast, gain"] = metrics.poisson_gain(split.held, model.impute(task, output="rate"), split.train)
    if "ours, to that gain, s" in found:
        found["ours over scVI, training"] = found["ours, to that gain, s"] / found["scVI, training, s"]
    return found


# ------------------------------------------------------------------------------------------------------------ transfer


def transfer(data: str, library_key: str, seed: int) -> Values:
    """Gain in most fields of view of a model of the few others: as it is, tuned, and of one fitted anew."""
    import numpy as np

    import spaformer_sc as sf
    from spaformer_sc import metrics

    adata = load(data, library_key)
    if key_in(adata, library_key) is None:
        raise SystemExit(f"{data}: transfer needs fields of view in obs[{library_key!r}]")
    names = adata.obs[library_key].cat.categories
    few = np.asarray(adata.obs[library_key].isin(names[::FEW]))
    here, there = adata[few].copy(), adata[~few].copy()
    split = metrics.thin(there.X, 0.5, random_state=seed)
    there.X = split.train
    found: Values = {"cells of the few": float(here.n_obs), "cells of the others": float(there.n_obs)}

    def fitted(title: str, fit: Callable[[], Any]) -> Any:
        started = time.process_time()
        model = fit()
        found[f"{title}, CPU s"] = time.process_time() - started
        found[f"{title}, steps"] = model.history["step"][-1]
        found[f"{title}, gain"] = metrics.poisson_gain(split.held, model.impute(there, output="rate"), split.train)
        return model

    def new() -> Any:
        return sf.SpaFormer(library_key=library_key, quality="fast", random_state=seed, progress=False)

    model = fitted("fitted to the few, as it is", lambda: new().fit(here))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        saved = sf.SpaFormer.load(Path(folder) / "model", progress=False)
    for effort in EFFORTS:
        tune = partial(saved.fine_tune, there, effort=effort)
        fitted(f"tuned with at most {100 * effort:.0f} % of the steps", tune)
    fitted("fitted anew", lambda: new().fit(there))
    return found


# -------------------------------------------------------------------------------------------------------------- tissue


def simulate(path: Path, cells: int, genes: int, seed: int) -> None:
    """Simulate slides of ten FOVs and add them to a file one after the other."""
    import anndata as ad
    import h5py
    import numpy as np
    import pandas as pd
    from anndata.io import sparse_dataset, write_elem

    import spaformer_sc as sf

    n_slides = -(-cells // (SLIDE_FOVS * FOV_CELLS))
    obs, xy = [], []
    for slide in range(n_slides):
        n_cells = min(FOV_CELLS, cells // SLIDE_FOVS)
        tissue = sf.datasets.simulated_tissue(SLIDE_FOVS, n_cells, genes, random_state=seed + slide, panel_state=seed)
        tissue.obs["slide"] = str(slide)
        obs.append(tissue.obs[["slide", "fov"]].astype(str))
        xy.append(tissue.obsm["spatial"])
        if slide == 0:
            ad.AnnData(tissue.X, var=tissue.var[[]]).write_h5ad(path)
        else:
            with h5py.File(path, "r+") as file:
                sparse_dataset(file["X"]).append(tissue.X)
        print(f"simulated slide {slide + 1} of {n_slides}", file=sys.stderr, flush=True)
    every = pd.concat(obs).astype("category")
    every.index = pd.RangeIndex(len(every)).astype(str)
    with h5py.File(path, "r+") as file:
        write_elem(file, "obs", every)
        write_elem(file, "obsm", {"spatial": np.concatenate(xy)})


def tissue(cells: int, genes: int, seed: int, out: str, quality: str) -> Values:
    """Time and peak memory of the imputation of a simulated tissue from file to file, and its score."""
    import anndata as ad
    import numpy as np

    import spaformer_sc as sf

    path = Path(out) / f"tissue-{cells}x{genes}-{seed}.h5ad"
    if not path.exists():
        part = path.with_suffix(".part.h5ad")
        # In a process of its own: its memory is not that of the imputation.
        job = {"function": "simulate", "path": str(part), "cells": cells, "genes": genes, "seed": seed}
        subprocess.run([sys.executable, __file__, "--job", json.dumps(job), ""], check=True)
        part.rename(path)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        result = Path(folder) / "imputed.zarr"
        started = time.perf_counter()
        adata = ad.read_h5ad(path, backed="r")
        keys = ["slide", "fov"]
        sf.tl.impute(adata, library_key=keys, quality=quality, random_state=seed, output_path=result, progress=False)
        seconds = time.perf_counter() - started
        peak = peak_mib()
        adata.file.close()
        import zarr

        store = zarr.open_group(str(result), mode="r")
        layer = store["layers/spaformer"]
        some = np.asarray(layer[:: max(1, cells // 50)])
        found = ad.io.read_elem(store["uns/spaformer"])
        size = sum(file.stat().st_size for file in result.rglob("*") if file.is_file())
    path.unlink()
    return {
        "cells written": float(layer.shape[0]),
        "minutes": seconds / 60,
        "peak, MiB": peak,
        "result on disk, MiB": size / 2**20,
        "gain on held-out transcripts": float(found["scores"]["gain"]),
        "gain over baseline": float(found["scores"]["gain_over_baseline"]),
        "finite": float(np.isfinite(some).all()),
    }


# ---------------------------------------------------------------------------------------------------------------- runs


def run_job(job: dict[str, Any]) -> Values:
    """Do what a job says, in this process."""
    from spaformer_sc._threads import wait_patiently

    wait_patiently()
    import torch

    if "threads" in job:
        torch.set_num_threads(int(job.pop("threads")))
    function = job.pop("function")
    if function == "simulate":
        simulate(Path(job["path"]), job["cells"], job["genes"], job["seed"])
        return {}
    functions: dict[str, Any] = {
        "growth": growth,
        "step": step,
        "memory": memory,
        "race": race,
        "whole": whole,
        "transfer": transfer,
        "tissue": tissue,
    }
    return dict(functions[function](**job))


def in_process(job: dict[str, Any], threads: int) -> Values | None:
    """Do a job in a process of its own; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--job", json.dumps({"threads": threads} | job), str(answer)]
        if subprocess.run(command, env=pinned_environment(threads), check=False).returncode or not answer.exists():
            return None
        return dict(json.loads(answer.read_text()))


def planned(arguments: argparse.Namespace) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every run: its key in the results file, and its job."""
    runs: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def add(part: str, data: str, cells: int, genes: int, fovs: int, seed: int, job: dict[str, Any]) -> None:
        numbers = (str(number) if number else "" for number in (cells, genes, fovs))
        key = part, data, *numbers, str(arguments.threads), str(seed)
        runs.append((key, {"function": part, "seed": seed} | job))

    for seed in arguments.seeds:
        if "growth" in arguments.parts:
            sizes = [(cells, 1) for cells in ONE_FOV] + [(CELLS_OF_A_FOV * fovs, fovs) for fovs in MANY_FOVS]
            for cells, fovs in sizes:
                if cells <= arguments.most_cells:
                    job = {"cells": cells, "genes": GROWTH_GENES, "fovs": fovs}
                    add("growth", "simulated", cells, GROWTH_GENES, fovs, seed, job)
        for part in ("step", "memory", "race", "transfer"):
            if part in arguments.parts:
                for data in arguments.data:
                    job = {"data": data, "library_key": arguments.library_key}
                    add(part, Path(data).stem, 0, 0, 0, seed, job)
                    for method in RACERS if part == "race" else ():
                        add(
                            part,
                            f"{Path(data).stem}, {method}",
                            0,
                            0,
                            0,
                            seed,
                            job | {"function": "whole", "method": method},
                        )
        if "tissue" in arguments.parts:
            for cells in arguments.cells:
                job = {"cells": cells, "genes": arguments.genes, "out": arguments.out, "quality": arguments.quality}
                add("tissue", f"simulated, {arguments.quality}", cells, arguments.genes, 0, seed, job)
    return runs


# -------------------------------------------------------------------------------------------------------------- tables


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def report(rows: Iterable[Row]) -> str:
    """Write all results as Markdown tables."""
    newest = {(tuple(row[name] for name in KEY), row["score"]): row for row in rows}
    runs: dict[tuple[str, ...], Values] = {}
    for (key, score), row in newest.items():
        runs.setdefault(key, {})[score] = float(row["value"])
    lines: list[str] = []
    by_part = {part: {key: values for key, values in runs.items() if key[0] == part} for part in PARTS}
    for title, in_one in (("one field of view", True), (f"fields of view of {CELLS_OF_A_FOV} cells", False)):
        sizes = {key: int(key[2]) for key in by_part["growth"]}
        of_kind = [key for key in sizes if (sizes[key] != CELLS_OF_A_FOV * int(key[4])) == in_one]
        chosen = {sizes[key]: by_part["growth"][key] for key in sorted(of_kind, key=sizes.__getitem__)}
        if len(chosen) < 2:
            continue
        lines += [f"**Growth**, {title}: microseconds per cell", ""]
        lines += ["| cells | " + " | ".join(STAGES) + " |", "|" + "---|" * (len(STAGES) + 1)]
        for cells, values in chosen.items():
            lines.append(f"| {cells} | " + " | ".join(f"{1e6 * values[stage] / cells:.1f}" for stage in STAGES) + " |")
        for least, of in ((0, ""), (MANY_CELLS, f", from {MANY_CELLS} cells")):
            among = [cells for cells in chosen if cells >= least]
            if len(among) < 2:
                continue
            slopes = [exponent(among, [chosen[cells][stage] for cells in among]) for stage in STAGES]
            lines.append(f"| exponent of the time{of} | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |")
        lines.append("")
    lines += races(by_part["race"])
    for part in PARTS[1:]:
        for key, values in by_part[part].items():
            if ", " in key[1] and part == "race":
                continue
            size = ", ".join(f"{number} {name}" for number, name in zip(key[2:5], ("cells", "genes", "FOVs")) if number)
            title = ", ".join(text for text in (key[1], size, f"{key[5]} thread(s)", f"seed {key[6]}") if text)
            lines += [f"**{part.capitalize()}**: {title}", "", "| | |", "|---|---|"]
            lines += [f"| {score} | {value:.4g} |" for score, value in values.items()]
            lines.append("")
    return "\n".join(lines)


def races(runs: dict[tuple[str, ...], Values]) -> list[str]:
    """A table for each data set, number of threads and seed: what each method takes from counts to result."""
    lines: list[str] = []
    methods = {key: key[1].partition(", ") for key in runs if ", " in key[1]}
    for data, *rest in dict.fromkeys((methods[key][0], *key[2:]) for key in methods):
        lines += [f"**Race**, from counts to result: {data}, {rest[3]} thread(s), seed {rest[4]}", ""]
        lines += ["| method | " + " | ".join(COSTS) + " |", "|" + "---|" * (len(COSTS) + 1)]
        for key, (of, _, method) in methods.items():
            if (of, *key[2:]) == (data, *rest):
                lines.append(f"| {method} | " + " | ".join(f"{runs[key][cost]:.4g}" for cost in COSTS) + " |")
        lines.append("")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default="scale", metavar="FOLDER", help="results: runs.csv, tables.md (default: scale)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["growth", "tissue"])
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help=".h5ad files for step, memory, race and transfer"
    )
    parser.add_argument("--library-key", default="fov", metavar="COLUMN", help="obs column of fields of view")
    parser.add_argument("--cells", nargs="+", type=int, default=[1_000_000], metavar="N", help="sizes of the tissue")
    parser.add_argument("--genes", type=int, default=500, metavar="N", help="genes of the tissue (default: 500)")
    parser.add_argument("--quality", default="default", help="quality of the tissue's imputation (default: default)")
    parser.add_argument("--most-cells", type=int, default=200_000, metavar="N", help="largest size of growth")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a run (default: 1)")
    parser.add_argument("--tables-only", action="store_true", help="print the tables of the results that there are")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.job:
        values = run_job(json.loads(arguments.job[0]))
        if arguments.job[1]:
            Path(arguments.job[1]).write_text(json.dumps(values))
        return 0
    if not arguments.data and set(arguments.parts) & {"step", "memory", "race", "transfer"}:
        parser.error("step, memory, race and transfer need --data")
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.csv"
    rows = read_rows(path, COLUMNS)
    code = checksum(file.read_bytes() for file in [*package_files(), Path(__file__)])
    done = {(*(row[name] for name in KEY), row["code"]) for row in rows}
    failed = 0
    runs = [] if arguments.tables_only else [run for run in planned(arguments) if (*run[0], code) not in done]
    for number, (key, job) in enumerate(runs, start=1):
        values = in_process(job, arguments.threads)
        print(
            f"[{number}/{len(runs)}] {' '.join(filter(None, key))}: {'failed' if values is None else 'done'}",
            flush=True,
        )
        if values is None:
            failed += 1
            continue
        for score, value in values.items():
            rows.append(dict(zip(KEY, key)) | {"code": code, "score": score, "value": repr(value)})
        write_rows(path, COLUMNS, rows)
    text = report(rows)
    (folder / "tables.md").write_text(text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
