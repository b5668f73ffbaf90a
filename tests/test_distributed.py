"""Training on several devices: two processes on this computer do what one does, and end together."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import spaformer_sc as sf
from spaformer_sc import _checks
from spaformer_sc._config import Training
from spaformer_sc.nn.masking import MaskingRates, SparseCounts, corrupt
from spaformer_sc.training import checkpoint as checkpoints
from spaformer_sc.training import trainer
from spaformer_sc.training.checkpoint import Checkpoint
from spaformer_sc.training.ranks import Ranks, largest_first, launch
from spaformer_sc.training.sequences import Batch, View, collate
from spaformer_sc.training.trainer import _Loss, batch_loss, batch_size, train
from tests.conftest import contents
from tests.test_network import CPU, awake, network, sampler, tissue
from tests.test_training import silent

QUICK = {"library_key": "fov", "quality": "fast", "max_epochs": 40, "progress": False, "random_state": 1}
LIMIT = 300
lightning = pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")


@pytest.fixture
def limit():
    """End a test that hangs; what it has started ends with it."""

    def stop(*_):
        raise TimeoutError(f"not done after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_of(rank: int, size: int) -> Ranks:
    found = Ranks()
    found.rank, found.size = rank, size
    return found


# --- without processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("n_fovs", [1, 2, 5])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_have_equally_many_cells_and_each_cell_once(n_fovs: int, size: int, compact: bool) -> None:
    data = tissue(n_fovs=n_fovs)
    cells = []
    for rank in range(size):
        dealt = one_of(rank, size).deal(data, [3, 1], whole=False, compact=compact)
        cells.append(np.concatenate([part.fov.cells[part.fov.own] for part in dealt]))
        assert all(part.fov.own.any() for part in dealt)
    assert np.ptp([len(part) for part in cells]) <= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(cells)), np.arange(90))
    again = one_of(0, size).deal(data, [3, 2], whole=False, compact=compact)
    assert {*cells[0].tolist()} != {c for part in again for c in part.fov.cells[part.fov.own].tolist()}


def test_where_a_step_is_a_fov_every_rank_has_a_part_of_each() -> None:
    data = tissue()
    parts = [one_of(rank, 2).deal(data, [0], whole=True, compact=False) for rank in range(2)]
    for sequence in data:
        own = [p.fov.own for part in parts for p in part if p.fov.name == sequence.fov.name]
        assert len(own) == 2
        assert abs(int(own[0].sum()) - int(own[1].sum())) <= 1
        np.testing.assert_array_equal(own[0] ^ own[1], sequence.fov.own)


def test_a_compact_part_lies_together() -> None:
    data = tissue(n_fovs=1)
    part = one_of(0, 2).deal(data, [0], whole=False, compact=True)[0]
    positions, own = part.fov.positions, part.fov.own
    apart = np.linalg.norm(positions[own].mean(0) - positions[~own].mean(0))
    scattered = one_of(0, 2).deal(data, [0], whole=False, compact=False)[0].fov.own
    assert apart > 3 * np.linalg.norm(positions[scattered].mean(0) - positions[~scattered].mean(0))


def test_largest_first_balances() -> None:
    ranks = largest_first([7, 1, 6, 2, 5, 3], 2)
    assert [sum(np.array([7, 1, 6, 2, 5, 3])[ranks == rank]) for rank in range(2)] == [12, 12]
    assert largest_first([], 2).tolist() == []


@pytest.mark.parametrize("decoder", ["poisson", "gaussian"])
def test_losses_of_parts_have_the_mean_of_the_whole(decoder: str) -> None:
    net = awake(network(decoder=decoder, posterior=False))
    whole, parts = batches()
    size = sum(float(batch_size(net, part)) for part in parts) / 2
    found = sum(batch_loss(net, part, 0.0, torch.Generator(), size) for part in parts) / 2
    torch.testing.assert_close(found, batch_loss(net, whole, 0.0, torch.Generator()))


@pytest.mark.parametrize(
    ("devices", "error", "message"),
    [
        (0, ValueError, "`devices=0` must be at least 1"),
        (1.5, TypeError, "`devices=1.5` must be a whole number"),
        (True, TypeError, "`devices=True` must be a whole number"),
    ],
)
def test_the_number_of_devices_is_checked(devices, error, message) -> None:
    with pytest.raises(error, match=message):
        sf.SpaFormer(devices=devices)


def test_without_lightning_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"`devices=2` needs Lightning: pip install 'spaformer_sc\[distributed\]'"):
        sf.SpaFormer(devices=2)
    sf.SpaFormer(devices=1)


@lightning
def test_the_number_of_devices_is_that_of_the_processes(monkeypatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="`devices=2`, but 4 processes have been started: pass devices=4"):
        sf.SpaFormer(devices=2)
    sf.SpaFormer(devices=4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="`devices=4` asks for 2 GPUs on this machine, which shows 1"):
        _checks.check_kind_of_devices(4, torch.device("cuda"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ValueError, match="`devices=4` asks for 4 GPUs"):
        _checks.check_kind_of_devices(4, torch.device("cuda"))
    for name in ("cuda:0", "mps"):
        with pytest.raises(ValueError, match=f"not '{name}'"):
            _checks.check_kind_of_devices(2, torch.device(name))
    for name, value in {"SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="pass devices=6"):
        sf.SpaFormer(devices=2)


@lightning
def test_more_devices_than_cells_are_refused(no_training) -> None:
    adata = sf.datasets.simulated_tissue(n_fovs=1, n_cells=60, n_genes=20)
    with pytest.raises(ValueError, match=r"`devices=61` are more than there are cells \(60\)"):
        sf.tl.impute(adata, devices=61, device="cpu", progress=False)


# --- two processes ----------------------------------------------------------------------------------------------------


def batches() -> tuple[Batch, list[Batch]]:
    """A batch of two FOVs of unequal size, of which one has hidden genes, and its two parts."""
    data, take = tissue(n_fovs=2), sampler()
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for sequence, name, n in zip(data, ("thinning", "features"), (12, 31), strict=True):
        hidden = corrupt((name,), SparseCounts.of(sequence.counts), None, take.gene_share, MaskingRates(), generator)
        view = View.of(sequence.fov, hidden, take.gene_share, 30.0, take.gene_share)
        pieces.append((view, torch.arange(n)))
    joined = [collate(part, positional=None, graph=False, device=CPU) for part in (pieces, pieces[:1], pieces[1:])]
    return joined[0], joined[1:]


def gradients(ranks: Ranks) -> list[torch.Tensor | None]:
    net = awake(network())
    part = batches()[1][ranks.rank]
    [(part, size)] = ranks.together(iter([part]), lambda found: batch_size(net, found))
    averaging = ranks.averaging(_Loss(net))
    averaging(part, 0.0, torch.Generator(), size).backward()
    return [parameter.grad for parameter in net.parameters()]


def trained(ranks: Ranks, data, config: Training, keep: Checkpoint | None = None, take=None, **changes):
    """Train; what every rank has in the end, and its history."""
    take = take or sampler()

    def validate(net) -> float:
        share = net.decoder.share(net(take.whole(data[0])).decoded)
        return float(torch.from_numpy(data[0].counts.toarray()).mul(share.log()).sum().detach())

    best, history = train(
        network(**changes), data, take, config, validate=validate, seed=5, progress=silent, checkpoint=keep, ranks=ranks
    )
    return ranks.all((best.state_dict(), history))


def several(ranks: Ranks, folder: Path) -> dict[str, object]:
    """All that is tried in one pair of processes."""
    found: dict[str, object] = {"gradients": gradients(ranks)}
    config = Training(max_epochs=4, patience=50)
    cases = {
        "3 FOVs": (tissue(), sampler()),
        "1 FOV": (tissue(n_fovs=1), sampler()),
        "two cells": (tissue(n=2, n_fovs=1), sampler()),
        "whole FOVs": (tissue(), sampler(tokens_per_step=None)),
        "windows": (tissue(n_fovs=2), sampler(windows=True)),
        "in pieces": (tissue(n_fovs=7), sampler(buffer_bytes=1)),
    }
    found["trained"] = {name: trained(ranks, data, config, take=take) for name, (data, take) in cases.items()}
    found["variational"] = trained(ranks, tissue(), config, variational=True, dropout=0.1)

    original, calls = trainer.batch_loss, 0

    def bad(*arguments):
        nonlocal calls
        calls += 1
        return original(*arguments) * (math.nan if ranks.rank == 1 and calls > 7 else 1.0)

    trainer.batch_loss = bad
    found["diverged"] = trained(ranks, tissue(), Training(max_epochs=10, n_validations=15))
    trainer.batch_loss = original

    checkpoints.INTERVAL = 0.0
    keep = Checkpoint(folder / "kept", resume=False, choices={"version": "", "data": ""})
    keep.writes = ranks.first
    keep.begin({})
    ranks.wait()

    def fail(*arguments):
        nonlocal calls
        calls += 1
        return 1 / 0 if calls > 7 else original(*arguments)

    calls, trainer.batch_loss = 0, fail
    try:
        trained(ranks, tissue(), config, keep)
    except ZeroDivisionError:
        found["interrupted"] = calls
    trainer.batch_loss = original
    ranks.wait()
    found["resumed"] = trained(ranks, tissue(), config, keep)
    return found


@lightning
def test_two_processes_train_one_network(limit, tmp_path) -> None:
    found = launch(several, tmp_path, devices=2, device=CPU, threads=2)

    net = awake(network())
    batch_loss(net, batches()[0], 0.0, torch.Generator()).backward()
    expected = [parameter.grad for parameter in net.parameters()]
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected)
    for gradient, want in zip(found["gradients"], expected, strict=True):
        if want is not None:
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6)

    runs = {**found["trained"], **{name: found[name] for name in ("variational", "diverged", "resumed")}}
    for name, ((one, history), (other, also)) in runs.items():
        assert history == also, name
        assert all(torch.equal(one[key], other[key]) for key in one), name
        assert all(bool(torch.isfinite(value).all()) for value in one.values()), name
    steps = {name: run[0][1].step[-1] for name, run in runs.items()}
    assert {name: steps[name] for name in ("3 FOVs", "1 FOV", "two cells", "whole FOVs", "windows")} == {
        "3 FOVs": 12, "1 FOV": 12, "two cells": 4, "whole FOVs": 12, "windows": 12,
    }  # fmt: skip
    assert steps["diverged"] == 6
    assert found["interrupted"] == 8
    for kept, uninterrupted in zip(found["resumed"][0][0].values(), found["trained"]["3 FOVs"][0][0].values()):
        assert torch.equal(kept, uninterrupted)


def one_fails(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("no luck")
    ranks.wait()


@lightning
def test_when_one_process_fails_all_end_with_its_error(limit) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)one of 2 training processes failed.*ValueError: no luck"):
        launch(one_fails, devices=2, device=CPU, threads=2)


PROGRAM = """
import sys
import anndata as ad
import spaformer_sc as sf

def main(path, out, **arguments):
    adata = ad.read_h5ad(path)
    sf.tl.impute(adata, devices=2, **arguments)
    adata.write_h5ad(out)
    streamed = path.replace("in.h5ad", "streamed.h5ad")
    sf.tl.impute(ad.read_h5ad(path, backed="r"), devices=2, output_path=streamed, **arguments)

if __name__ == "__main__":
    main(*sys.argv[1:], **%r)
"""


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(sf.__file__).parents[1]), **changes}


@lightning
def test_two_processes_impute_like_one_however_they_are_started(limit, tmp_path, caplog) -> None:
    import anndata as ad

    tissue = sf.datasets.simulated_tissue(n_fovs=3, n_cells=150, n_genes=40, random_state=2)
    tissue.write_h5ad(tmp_path / "in.h5ad")
    one = sf.tl.impute(tissue, copy=True, **QUICK)
    with caplog.at_level("INFO"):
        two = sf.tl.impute(tissue, copy=True, devices=2, **QUICK)
    assert sum("network 1: wide" in message for message in caplog.messages) == 1
    scores, alone = two.uns["spaformer"]["scores"], one.uns["spaformer"]["scores"]
    assert abs(scores["gain"] - alone["gain"]) < 0.1 * alone["gain"]
    best, best_alone = (max(a.uns["spaformer"]["history"]["validation"]) for a in (two, one))
    assert abs(best - best_alone) < 0.1 * best_alone
    assert two.uns["spaformer"]["params"]["devices"] == 2

    started: list[subprocess.Popen[bytes]] = []
    port = free_port()
    try:
        for rank in range(2):
            arguments = [PROGRAM % QUICK, str(tmp_path / "in.h5ad"), str(tmp_path / f"out{rank}.h5ad")]
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sizes = {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            command = [sys.executable, "-c", *arguments]
            started.append(subprocess.Popen(command, env=environment(**places, **sizes)))
        assert [process.wait() for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = [contents(ad.read_h5ad(tmp_path / name)) for name in ("out0.h5ad", "out1.h5ad", "streamed.h5ad")]
    two.write_h5ad(tmp_path / "two.h5ad")
    assert found[0] == found[1] == found[2] == contents(ad.read_h5ad(tmp_path / "two.h5ad"))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "in.h5ad", "out0.h5ad", "out1.h5ad", "streamed.h5ad", "two.h5ad",
    ]  # fmt: skip


def free_port() -> str:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@lightning
def test_a_script_without_a_guard_ends_with_advice(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import spaformer_sc as sf\n"
        "adata = sf.datasets.simulated_tissue(n_fovs=1, n_cells=60, n_genes=20)\n"
        "sf.tl.impute(adata, devices=2, quality='fast', max_epochs=1, progress=False)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert ended.returncode == 1
    assert "call it under `if __name__ == '__main__':`" in ended.stderr
    assert "RuntimeError: one of 2 training processes failed" in ended.stderr
