"""The command line under interrupts, kills, full disks and wrong files: either the old output or the new, no other."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from spaformer_sc import _files, _write, cli
from spaformer_sc.training import checkpoint
from tests.conftest import sha256

QUICK = ["--library-key", "fov", "--max-epochs", "1", "--quality", "fast"]
FORMS = ["h5ad", "zarr"]


def run(*arguments):
    """Exit code of the command line."""
    return cli.main([str(argument) for argument in arguments])


def read(path):
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def write(adata, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2 data", UserWarning)
        adata.write_h5ad(path) if path.suffix == ".h5ad" else adata.write_zarr(path)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C arrives, in processes started here too; a job in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def source(tissue, tmp_path):
    """A file to impute; `tmp_path` holds nothing else."""
    write(tissue, tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


@pytest.fixture
def older(tissue, source):
    """A function that puts an older output of a form beside the source, and gives its path and hash."""

    def make(form):
        path = source.with_name(f"out.{form}")
        write(tissue[:20].copy(), path)
        return path, sha256(path)

    return make


@pytest.fixture(scope="module")
def wanted(shared_tissue, tmp_path_factory):
    """The layer that an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shared_tissue.write_h5ad(folder / "in.h5ad")
    assert run("impute", folder / "in.h5ad", folder / "out.h5ad", *QUICK, "--quiet") == 0
    return ad.read_h5ad(folder / "out.h5ad").layers["spaformer"]


def names(folder, *, but=()):
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in but)


# --- real processes ---------------------------------------------------------------------------------------------------

STOPPED = """
import importlib, sys, time
from spaformer_sc import cli
module, _, name = sys.argv[1].rpartition(".")
parts = module.split(":")
owner = importlib.import_module(parts[0])
for part in parts[1:]:
    owner = getattr(owner, part)
original, calls, last = getattr(owner, name), 0, int(sys.argv[2])
def stopped(*positional, **named):
    global calls
    calls += 1
    if calls == last:
        print("\\nit is here", file=sys.stderr, flush=True)
        while True:
            time.sleep(0.05)
    return original(*positional, **named)
setattr(owner, name, stopped)
sys.argv[1:] = sys.argv[3:]
cli.program()
"""
"""The command line, which waits at a call of a function: module[:class].function and the number of the call."""

READING = ("spaformer_sc._checks.scan_counts", 1)
TRAINING = ("spaformer_sc.training.trainer.batch_loss", 1)
WRITING = ("spaformer_sc._write._copy_counts", 1)
PLACING = ("zarr.consolidate_metadata", 1)
SAID = {signal.SIGINT: (130, "spaformer-sc: interrupted."), signal.SIGTERM: (143, "spaformer-sc: terminated.")}


def stopped_at(place, how, *arguments):
    """Run the command line in a process of its own, send it a signal at a place, and give its end."""
    command = [sys.executable, "-c", STOPPED, place[0], str(place[1]), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        said = []
        for line in process.stderr:
            if line == "it is here\n":
                break
            said.append(line)
        else:
            pytest.fail(f"ended early: {said}")
        process.send_signal(how)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("form", "place", "how"),
    [
        ("h5ad", READING, signal.SIGINT),
        ("zarr", TRAINING, signal.SIGTERM),
        ("h5ad", WRITING, signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_run_in_order(source, older, wanted, form, place, how):
    out, before = older(form)
    code, printed, err = stopped_at(place, how, "impute", source, out, *QUICK)
    assert (code, printed) == (SAID[how][0], "")
    assert err.splitlines()[-1] == SAID[how][1]
    assert "Traceback" not in err
    assert sha256(out) == before
    partial = f"{out.name}.partial"
    resumed = (source.parent / partial).exists()
    assert resumed == ("resume=True goes on from there" in err) == (place == WRITING)
    assert names(source.parent, but=[partial]) == ["in.h5ad", out.name]
    assert run("impute", source, out, *QUICK, "--quiet", *["--resume"] * resumed) == 0
    np.testing.assert_array_equal(read(out).layers["spaformer"], wanted)
    assert names(source.parent) == ["in.h5ad", out.name]


@pytest.mark.parametrize(("form", "place"), [("h5ad", WRITING), ("zarr", PLACING)], ids=FORMS)
def test_what_a_kill_leaves_is_in_nobodys_way(source, older, wanted, form, place):
    out, before = older(form)
    code, printed, _ = stopped_at(place, signal.SIGKILL, "impute", source, out, *QUICK, "--quiet")
    assert (code, printed) == (-signal.SIGKILL, "")
    assert sha256(out) == before
    left = names(source.parent, but=["in.h5ad", out.name])
    assert f"{out.name}.partial" in left
    assert run("impute", source, out, *QUICK, "--quiet") == 0
    np.testing.assert_array_equal(read(out).layers["spaformer"], wanted)
    # A folder of a name of its own, in which the output was being written, may stay.
    for name in names(source.parent, but=["in.h5ad", out.name]):
        assert name.startswith(f".{out.name}.")


# --- signals and their handlers ---------------------------------------------------------------------------------------


def interrupting(monkeypatch, owner, name, act, call=1):
    """Let a function do something else first, at one of its calls."""
    original, calls = getattr(owner, name), []

    def acts(*positional, **named):
        calls.append(1)
        if len(calls) == call:
            act()
        return original(*positional, **named)

    monkeypatch.setattr(owner, name, acts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", SAID)
def test_a_signal_when_the_output_takes_its_place(source, older, monkeypatch, capsys, form, how):
    out, before = older(form)
    handler = signal.getsignal(signal.SIGTERM)
    interrupting(monkeypatch, _files.os, "fsync", lambda: signal.raise_signal(how), call=4)
    code, said = SAID[how]
    assert run("impute", source, out, *QUICK, "--quiet") == code
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert sha256(out) == before
    assert names(source.parent, but=[f"{out.name}.partial"]) == ["in.h5ad", out.name]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_run_beside_the_main_thread_handles_no_signals(source, tmp_path):
    codes = []
    arguments = ("impute", source, tmp_path / "no" / "out.h5ad", *QUICK, "--quiet")
    thread = threading.Thread(target=lambda: codes.append(run(*arguments)))
    thread.start()
    thread.join()
    assert codes == [1]


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """A function that lets the system refuse, from a call of a function on, to write more than 2 kB into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(owner, name, call=1):
        interrupting(
            monkeypatch, owner, name, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard)), call=call
        )

    def emptied():
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    full.emptied = emptied
    yield full
    emptied()


FULL_DISK = """
import resource, sys
from spaformer_sc import _write, cli
write_whole = _write._write_whole
def full(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    write_whole(*arguments)
_write._write_whole = full
cli.program()
"""


def test_a_full_disk_does_not_crash_the_process(source, older, wanted):
    """HDF5 does so when it ends, if it could not write."""
    out, before = older("h5ad")
    command = [sys.executable, "-c", FULL_DISK, "impute", str(source), str(out), *QUICK, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"spaformer-sc: {os.strerror(errno.EFBIG)}."
    assert sha256(out) == before
    assert names(source.parent) == ["in.h5ad", out.name, f"{out.name}.partial"]
    assert run("impute", source, out, *QUICK, "--quiet", "--resume") == 0
    np.testing.assert_array_equal(read(out).layers["spaformer"], wanted)


FULL = {  # when the disk is full: owner and name of the function from which on
    "when counts are copied": (_write, "_copy_counts"),
    "when a network is kept": (checkpoint.torch, "save"),
    "when predictions are kept": (np, "savez"),
}


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk(source, older, wanted, full_disk, capsys, when):
    out, before = older("zarr")
    full_disk(*FULL[when])
    code = run("impute", source, out, *QUICK, "--quiet")
    full_disk.emptied()
    shown = capsys.readouterr()
    assert (code, shown.out) == (1, "")
    assert "spaformer-sc: " in shown.err
    assert sha256(out) == before
    partial = source.parent / f"{out.name}.partial"
    assert names(source.parent, but=[partial.name]) == ["in.h5ad", out.name]
    assert not list(source.parent.rglob("*.fresh"))
    assert run("impute", source, out, *QUICK, "--quiet", *["--resume"] * partial.exists()) == 0
    np.testing.assert_array_equal(read(out).layers["spaformer"], wanted)
    assert names(source.parent) == ["in.h5ad", out.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("place", [(_files.os, "fsync"), (_files.tempfile, "mkdtemp"), (_files.os, "replace")])
def test_an_error_of_the_system_is_said_in_its_words(source, older, monkeypatch, capsys, code, place):
    out, before = older("h5ad")

    def fail():
        raise OSError(code, os.strerror(code))

    interrupting(monkeypatch, _write, "_write_whole", lambda: interrupting(monkeypatch, *place, fail))
    if place[1] == "mkdtemp":
        interrupting(monkeypatch, _write, "replacing", lambda: interrupting(monkeypatch, *place, fail))
    assert run("impute", source, out, *QUICK, "--quiet") == 1
    assert f"spaformer-sc: [Errno {code}] {os.strerror(code)}\n" in capsys.readouterr().err
    assert sha256(out) == before
    assert names(source.parent, but=[f"{out.name}.partial"]) == ["in.h5ad", out.name]


# --- wrong files and words --------------------------------------------------------------------------------------------


def truncated(to):
    return lambda path, whole: path.write_bytes(whole[:to])


def no_anndata(path, whole):
    import h5py

    with h5py.File(path, "w") as file:
        file["numbers"] = np.arange(3)


INPUTS = {  # what IN is: how to make it, and what is said
    "text.h5ad": (lambda path, whole: path.write_text("not a file of HDF5"), "cannot be read as an AnnData"),
    "empty.h5ad": (lambda path, whole: path.touch(), "cannot be read as an AnnData"),
    "other.h5ad": (no_anndata, ""),
    "folder.h5ad": (lambda path, whole: path.mkdir(), "cannot be read as an AnnData"),
    "file.zarr": (lambda path, whole: path.write_bytes(whole), "cannot be read as an AnnData"),
    "folder.zarr": (lambda path, whole: path.mkdir(), "cannot be read as an AnnData"),
    "dangling.h5ad": (lambda path, whole: path.symlink_to("nowhere.h5ad"), "does not exist"),
    **{f"part{to}.h5ad": (truncated(to), "cannot be read as an AnnData") for to in (1, 600, 5000, 20_000)},
    "nearly.h5ad": (truncated(-1), "cannot be read as an AnnData"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_is_no_anndata_is_refused(source, tmp_path, monkeypatch, capsys, no_training, name):
    monkeypatch.chdir(tmp_path)
    make, message = INPUTS[name]
    make(Path(name), source.read_bytes())
    before = names(tmp_path)
    assert run("impute", name, "out.h5ad", *QUICK, "--quiet") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("spaformer-sc: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.h5ad", "out.h5ad", "--layer", "raw"], "`layer='raw'` is not in"),
        (["in.h5ad", "out.h5ad", "--missing", "mask"], "`missing='mask'` is not in"),
        (["in.h5ad", "out.h5ad", "--spatial-key", "xy"], "`spatial_key='xy'` is not in"),
        (["in.h5ad", "out.h5ad", "--set", "speed=3"], "`settings` has no 'speed'"),
        (["in.h5ad", "out.h5ad", "--set", "learning_rate=fast"], "learning_rate"),
        (["in.h5ad", "out.h5ad", "--target-sum", "nan"], "`target_sum=nan` must be a finite number"),
        (["in.h5ad", "out.h5ad", "--key-added", "a/b"], "`key_added='a/b'` cannot be written"),
        (["in.h5ad", "folder/out.h5ad"], "cannot be written to"),
        (["in.h5ad", "in.h5ad/out.h5ad"], "does not exist; create it first"),
        (["in.h5ad", "./folder/../in.h5ad"], "is the input file"),
    ],
)
def test_wrong_words(source, tmp_path, monkeypatch, capsys, no_training, arguments, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    access = os.access
    # What root may do everywhere, others may not in a folder that is read only.
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    assert run("impute", *arguments, *QUICK, "--quiet") == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert names(tmp_path) == ["folder", "in.h5ad"]


@pytest.mark.parametrize("arguments", [["--speed", "3"], ["--quality", "good"], ["--set", "hops"], ["a third file"]])
def test_wrong_usage_exits_with_two(source, tmp_path, capsys, no_training, arguments):
    with pytest.raises(SystemExit) as stop:
        run("impute", source, tmp_path / "out.h5ad", *arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "usage: spaformer-sc" in shown.err
    assert shown.out == ""
    assert names(tmp_path) == ["in.h5ad"]


def test_an_input_that_is_in_the_output_is_refused_too(tissue, tmp_path, capsys, no_training):
    write(tissue, tmp_path / "in.zarr")
    before = sha256(tmp_path / "in.zarr")
    assert run("impute", tmp_path / "in.zarr", f"{tmp_path / 'in.zarr'}/", *QUICK, "--quiet") == 1
    assert "is the input file" in capsys.readouterr().err
    assert sha256(tmp_path / "in.zarr") == before


def test_a_fit_that_diverges_fails_with_advice(source, tmp_path, capsys):
    assert run("impute", source, tmp_path / "out.h5ad", *QUICK, "--quiet", "--set", "learning_rate=1e9") == 1
    assert "lower the learning rate: settings={'learning_rate': 0.002}" in capsys.readouterr().err
    assert names(tmp_path) == ["in.h5ad"]


def test_the_output_is_named_once_and_by_the_first_process(source, tmp_path, caplog):
    with suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "out.zarr")
    with caplog.at_level("INFO"):
        assert run("impute", source, tmp_path / "out.zarr", *QUICK) == 0
    assert [message for message in caplog.messages if message.startswith("wrote ") and "out.zarr" in message] == [
        f"wrote {tmp_path / 'out.zarr'}"
    ]
