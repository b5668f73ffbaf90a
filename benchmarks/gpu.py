"""What a GPU makes of the network: training steps, attention by field of view, prediction, and moving batches to it.

    python benchmarks/gpu.py --out gpu
    python benchmarks/gpu.py --device cpu --cells 1000 --genes 100 --repeats 3 --out gpu

Without a CUDA device it says so and measures nothing, unless asked for another device. Measurements that the results
file holds, made by the same code on the same device, are skipped. `benchmarks/README.md` says what is measured.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from runs import Row, checksum, package_files, read_rows, write_rows
from scale import positions

import spaformer_sc as sf
from spaformer_sc._config import in_form
from spaformer_sc.nn.attention import ATTENTION
from spaformer_sc.training import trainer
from spaformer_sc.training.sequences import sequences

PARTS = ("step", "attention", "prediction", "transfer")
KEY = ("device", "torch", "part", "what", "cells", "genes")
SCORES = ("ms", "cells per s", "peak, MiB")
COLUMNS = (*KEY, "code", *SCORES)
PRECISIONS = ("float32", "bf16")
FORMS = ("plain", "large")
STEP_TOKENS = (512, 4_096)
FOV_TOKENS = (200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
CELLS_OF_A_FOV = 2_000
WARM_UP = 3

Measured = tuple[str, int, Callable[[], object]]
"""What is measured, of how many cells, and the function that is timed."""


class Bench:
    """A model and random cells, in fields of view of 2,000; what is measured of them on a device."""

    def __init__(self, device: str, cells: int, genes: int) -> None:
        self.device = torch.device(device)
        self.cells, self.genes = cells, genes
        counts = sp.random(cells, genes, 0.12, "csr", np.float32, random_state=0)
        counts.data[:] = 1 + np.random.default_rng(0).poisson(0.3, counts.nnz)
        place, fov = positions(cells, -(-cells // CELLS_OF_A_FOV), 0)
        adata = ad.AnnData(counts, obsm={"spatial": place})
        adata.obs["fov"] = fov.astype(str)
        # A fit to a few cells gives networks of the usual size.
        settings = {"n_networks": len(FORMS), "forms": list(FORMS), "n_steps": 1}
        self.model = sf.SpaFormer(library_key="fov", settings=settings, device="cpu", progress=False)
        self.model.fit(adata[:600].copy())
        loaded = self.model._take(self.model._open(adata, self.model.keys))
        self.data = sequences(loaded.fields, loaded.counts, None)
        self.sampler = self.model._sampler(torch.device("cpu"))

    def batches(self, tokens: int) -> list[Any]:
        """Batches of an epoch, on the host."""
        return list(replace(self.sampler, tokens_per_step=tokens).epoch(self.data, torch.Generator().manual_seed(0)))

    def step(self) -> Iterator[Measured]:
        """Training steps, batches on the device."""

        def act(network: Any, called: Any, optimizer: Any, average: Any, precision: str, turns: Iterator[Any]) -> None:
            with autocast(self.device, precision):
                loss = trainer.batch_loss(called, next(turns), 0.0, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update(network)

        noise = torch.Generator().manual_seed(0)
        for tokens in sorted({min(tokens, self.cells) for tokens in STEP_TOKENS}):
            there = [moved(batch, self.device) for batch in self.batches(tokens)]
            for form, precision, compiled in itertools.product(FORMS, PRECISIONS, (False, True)):
                network = copy.deepcopy(self.model._networks[FORMS.index(form)]).to(self.device).train()
                optimizer = trainer._optimizer(network, in_form(self.model.settings, form).training)
                average = trainer.WeightAverage(network, 0.99)
                torch.compiler.reset()  # else what was compiled for the others counts towards a limit
                called = torch.compile(network) if compiled else network
                what = f"{form}, {precision}{', compiled' if compiled else ''}"
                turns = itertools.cycle(there)
                yield what, tokens, partial(act, network, called, optimizer, average, precision, turns)

    def attention(self) -> Iterator[Measured]:
        """Attention of one layer and its gradient, over all cells, by the tokens of a field of view."""

        def act(layer: Any, x: Any, lengths: list[int], precision: str) -> None:
            with autocast(self.device, precision):
                result = layer(x, lengths)
            result.float().square().sum().backward()

        size = self.model.settings.dim
        for tokens, kind, precision in itertools.product(FOV_TOKENS, ("performer", "exact"), PRECISIONS):
            if tokens <= self.cells:
                layer = ATTENTION[kind](size, self.model.settings.n_heads).to(self.device)
                lengths = [tokens] * (self.cells // tokens)
                x = torch.randn(sum(lengths), size, generator=torch.Generator().manual_seed(0)).to(self.device)
                what = f"{kind}, {precision}, fields of view of {tokens}"
                yield what, len(x), partial(act, layer, x.requires_grad_(), lengths, precision)

    def prediction(self) -> Iterator[Measured]:
        """Log-normalised values of all cells, by one plain network, field of view by field of view."""

        def act(precision: str, given: list[Any], there: bool) -> None:
            with torch.inference_mode(), autocast(self.device, precision):
                for tokens in given:
                    tokens = tokens if there else moved(tokens, self.device)
                    value = network.decoder.lognorm(network(tokens).decoded, tokens.depth, 100.0)
                    if not there:
                        value.cpu()

        network = copy.deepcopy(self.model._networks[0]).to(self.device).eval()
        given = [self.sampler.whole(sequence) for sequence in self.data]
        for precision in PRECISIONS:
            yield f"{precision}, from and to the host", self.cells, partial(act, precision, given, False)
            on_device = [moved(tokens, self.device) for tokens in given]
            yield f"{precision}, all on the device", self.cells, partial(act, precision, on_device, True)

    def transfer(self) -> Iterator[Measured]:
        """A batch from the host to the device."""
        tokens = min(STEP_TOKENS[0], self.cells)
        batch = self.batches(tokens)[0]
        yield "not pinned", tokens, lambda: moved(batch, self.device)
        if self.device.type == "cuda":
            yield "pinned when it is moved", tokens, lambda: moved(pinned(batch), self.device, non_blocking=True)
            before = pinned(batch)
            yield "pinned before", tokens, lambda: moved(before, self.device, non_blocking=True)

    def measure(self, act: Callable[[], object], cells: int, repeats: int) -> dict[str, float]:
        """Median time of an action, and the largest memory of the device meanwhile."""
        cuda = self.device.type == "cuda"
        finish = partial(torch.cuda.synchronize, self.device) if cuda else lambda: None
        for _ in range(WARM_UP):
            act()
        finish()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            act()
            finish()
            times.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else float("nan")
        seconds = statistics.median(times)
        return dict(zip(SCORES, (1e3 * seconds, cells / seconds, peak), strict=True))


def autocast(device: Any, precision: str) -> Any:
    """Matrix products in this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every tensor of a batch."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


def pinned(batch: Any) -> Any:
    """A batch in memory that the device can read by itself."""
    return mapped(batch, lambda tensor: tensor.pin_memory())


def moved(batch: Any, device: Any, non_blocking: bool = False) -> Any:
    """A batch on the device."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def report(rows: Sequence[Row]) -> str:
    """Write the newest of all results as Markdown tables."""
    newest = {tuple(row[name] for name in KEY): row for row in rows}
    lines: list[str] = []
    for device, torch_version, part in dict.fromkeys(key[:3] for key in newest):
        lines += [f"**{part.capitalize()}**: {device}, torch {torch_version}", ""]
        lines += ["| | cells | genes | " + " | ".join(SCORES) + " |", "|" + "---|" * (3 + len(SCORES))]
        for key, row in newest.items():
            if key[:3] == (device, torch_version, part):
                lines.append(f"| {' | '.join(key[3:])} | " + " | ".join(f"{float(row[s]):.4g}" for s in SCORES) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu", metavar="FOLDER", help="results: runs.csv, tables.md (default: gpu)")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="default: cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cells", type=int, default=20_000, metavar="N", help="default: 20000")
    parser.add_argument("--genes", type=int, default=960, metavar="N", help="default: 960")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="of each measurement (default: 20)")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured (`--device cpu` does the same on the processor)")
        return 0
    cuda = arguments.device.startswith("cuda")
    name = torch.cuda.get_device_name(arguments.device) if cuda else platform.machine()
    path = Path(arguments.out) / "runs.csv"
    rows = read_rows(path, COLUMNS)
    code = checksum(file.read_bytes() for file in [*package_files(), Path(__file__)])
    done = {(*(row[column] for column in KEY), row["code"]) for row in rows}
    bench = Bench(arguments.device, arguments.cells, arguments.genes)
    failed = 0
    for part in arguments.parts:
        measurements = getattr(bench, part)()
        while True:
            try:
                what, cells, act = next(measurements)
            except StopIteration:
                break
            except (RuntimeError, ImportError) as error:  # what is measured does not fit; the other parts go on
                print(f"{part}: failed: {str(error).splitlines()[0]}", file=sys.stderr)
                failed += 1
                break
            key = name, torch.__version__, part, what, str(cells), str(arguments.genes)
            if (*key, code) in done:
                continue
            try:
                found = bench.measure(act, cells, arguments.repeats)
            except (RuntimeError, ImportError) as error:  # too little memory, no compiler
                print(f"{part}, {what}, {cells} cells: failed: {str(error).splitlines()[0]}", file=sys.stderr)
                failed += 1
                continue
            rows.append(dict(zip(KEY, key, strict=True)) | {"code": code} | {s: repr(found[s]) for s in SCORES})
            write_rows(path, COLUMNS, rows)
            print(f"{part}, {what}, {cells} cells: {found['ms']:.4g} ms", file=sys.stderr, flush=True)
    text = report(rows)
    path.with_name("tables.md").write_text(text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
